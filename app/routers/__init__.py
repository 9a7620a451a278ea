"""The routes. Each module is one small group of them; none knows images or tensors."""
