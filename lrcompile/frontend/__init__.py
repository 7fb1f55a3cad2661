"""From files and models to the lifted graph that the passes see."""
