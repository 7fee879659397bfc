"""The version of what the phantom draws, light to import: an up-to-date stage 00 does not load the
drawing code.
"""

# Part of the fingerprint of `data/phantom`: change it with every change of the drawing, so that
# finished data sets are drawn again.
# Data sets were once fingerprinted by the digests of the drawing code; these are its last, so that
# those data sets stay up to date.
DRAWING = {
    "phantom.py": "761ca3c8eb325c7f11524e9b03e309df",
    "phantom_canvas.py": "63c97393bd5bd83461fc8fc9968b2587",
    "phantom_dicom.py": "917a8d94d49bbec936fb397eb2745997",
    "phantom_injuries.py": "414badc99de9787f01f8186b9d768e9e",
}
