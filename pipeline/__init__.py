"""VoCo2D: raw abdominal-trauma CT to a scored Kaggle submission, with 2D-VoCo pretraining (arXiv
2601.14593).
"""

__version__ = "0.1.0"
