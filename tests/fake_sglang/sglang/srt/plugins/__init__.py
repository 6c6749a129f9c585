from importlib.metadata import entry_points

loaded = False


def load_plugins() -> None:
    global loaded
    if loaded:
        return
    loaded = True
    for plugin in entry_points(group="sglang.srt.plugins"):
        plugin.load()()
