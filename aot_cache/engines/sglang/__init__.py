"""SGLang's plug-in."""
