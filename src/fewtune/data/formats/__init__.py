"""One file a format of labelled images on disk: how it is recognised, and a listing of what it holds."""
