"""The whole way once, small: configuration to exported model and back."""

from sft_jax.config.data import Clean
from sft_jax.infer.predict import load_predictor
from sft_jax.jobs import evaluate, train
from sft_jax.run import open_run, prepare


def test_train_evaluate_predict(configure):
    result = train(prepare(configure("data.clean.whitespace=true", "data.augment.swap=0.1")))
    assert result.steps == 14
    scores, step = evaluate(open_run(result.directory), "test")
    assert result.test is not None and scores.metrics == result.test.metrics and step == result.best_step
    predictor = load_predictor(str(result.directory / "model"))
    assert predictor.clean == Clean(whitespace=True), "what was done to the texts of training"
    records = list(predictor(["bara bare", "cela doro"]))
    assert [set(r) for r in records] == [{"label", "scores"}] * 2
