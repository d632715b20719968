"""The segmentation service as a Ray Serve graph: ingress, model and refiner deployments.

Importing this package imports neither Ray nor torch; ``serve_graph.app:build`` is the import path
of a Serve config.
"""
