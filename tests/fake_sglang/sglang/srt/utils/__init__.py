from sglang.srt.utils.common import add_prometheus_middleware as add_prometheus_middleware
from sglang.srt.utils.common import broadcast_pyobj as broadcast_pyobj
