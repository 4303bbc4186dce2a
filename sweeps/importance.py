"""How much each swept setting mattered, by Optuna, as importance.json for analysis, which knows no Optuna."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lda.files import write_json
from lda.runs import FORMAT
from sweeps.study_folder import StudyFolder

if TYPE_CHECKING:
    from optuna import Study

IMPORTANCE = "importance.json"

_FEWEST = 10  # complete trials: from fewer an evaluator says something all the same, and it means nothing


def write_importance(study: Study, folder: StudyFolder) -> None:
    """Write importance.json: {"trials": n, "evaluators": {name: {setting: share}}}; nothing for few trials, or where
    all of them have one score. Two evaluators: fANOVA (Hutter et al., ICML 2014) over all trials, and PED-ANOVA
    (Watanabe et al., IJCAI 2023) of what sets the best tenth apart. They agree where there is something to see."""
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < _FEWEST or len({trial.value for trial in complete}) < 2:
        return
    evaluators = {"fANOVA": FanovaImportanceEvaluator(seed=0), "PED-ANOVA": PedAnovaImportanceEvaluator()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls an evaluator experimental
        found = {
            name: {key: float(share) for key, share in get_param_importances(study, evaluator=evaluator).items()}
            for name, evaluator in evaluators.items()
        }
    write_json(folder.path / IMPORTANCE, {"format": FORMAT, "trials": len(complete), "evaluators": found})
