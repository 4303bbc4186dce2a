"""One file for each data set and nothing else; see `lda/data/catalogue.py`."""
