"""Names of the stage folders of a run, of the files in them, and of the scripts that make them."""

MAKERS = {
    "data/phantom": "00_make_phantom",
    "01_slices": "01_convert_dicom",
    "02_volumes": "02_build_volumes",
    "03_folds": "03_make_folds",
    "04_voco2d": "04_pretrain_voco2d",
    "05_folds": "05_train_folds",
    "06_oof": "06_score_oof",
    "07_submission": "07_predict_test",
    "08_report": "08_report",
    "09_ablation": "09_ablate",
}
