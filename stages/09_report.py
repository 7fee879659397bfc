"""Stage 09: one self-contained page about the run, for people: what ran, what it made of the data,
scores, errors, cost.

Reads   the manifests, logs, tables and pictures of all finished stages below <out>,
        image_level_labels.csv of the data folder
Writes  <out>/09_report/index.html, manifest.json
"""

from pipeline.report.stage import write_report
from pipeline.run.command import main

if __name__ == "__main__":
    raise SystemExit(main(__file__, write_report, __doc__))
