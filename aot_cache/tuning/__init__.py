"""Choose between candidates that are compiled already, on the GPU that will serve. Stands above both wings."""
