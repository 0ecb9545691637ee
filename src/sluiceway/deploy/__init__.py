"""Whole recipes on real engines: NVFlare, Flower, and the site that joins them."""
