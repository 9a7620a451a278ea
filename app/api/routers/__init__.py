"""The routes. Each module is one small group; none knows what is in an image or a tensor."""
