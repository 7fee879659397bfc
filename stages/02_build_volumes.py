"""Stage 02: resample each series to one D x H x W volume.

Reads   <out>/01_slices/ (index.parquet and the PNG slices), with convert.keep_png=false the data
        folder as stage 01 does
Writes  <out>/02_volumes/<patient>_<series>.npy (uint8, superior first), index.parquet,
        manifest.json; with convert.keep_png=false also slices.parquet and quarantine.csv
"""

from pipeline.run.command import add_scheduler, main
from pipeline.volumes.stage import build_volumes

if __name__ == "__main__":
    raise SystemExit(main(__file__, build_volumes, __doc__, add_scheduler))
