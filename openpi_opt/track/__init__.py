"""What is kept of trials: the journal on disk, MLflow, the fingerprint, and tables of both.

The journal is the source of truth. MLflow is a view of it that can be rebuilt at any time with
`python -m openpi_opt.track sync`. Importing these modules loads neither torch nor MLflow.
"""
