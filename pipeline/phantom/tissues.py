"""Hounsfield units of healthy tissue, by contrast phase where they depend on it."""

# Mean HU by contrast phase, of a modest dose: nothing but bone and a blush saturates the window.
TISSUES = ("aorta", "ivc", "portal", "liver", "spleen", "cortex", "medulla", "wall", "urine")

PHASES = {
    "arterial": (180, 95, 120, 78, 122, 165, 80, 95, 10),
    "portal": (155, 145, 160, 112, 122, 165, 140, 85, 15),
    "delayed": (118, 115, 118, 95, 98, 125, 130, 70, 190),
}

FAT, MUSCLE, CORTICAL, MARROW, GAS, LUNG = -100.0, 58.0, 340.0, 110.0, -930.0, -860.0

SIDES = (-1, 1)  # the patient's right and left
