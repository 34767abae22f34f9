"""The whole way once, small: configuration to exported model and back."""

from sft_jax.infer.predict import load_predictor
from sft_jax.jobs import evaluate, train
from sft_jax.run import open_run, prepare


def test_train_evaluate_predict(configure):
    result = train(prepare(configure()))
    assert result.steps == 14
    scores, step = evaluate(open_run(result.directory), "test")
    assert result.test is not None and scores.metrics == result.test.metrics and step == result.best_step
    records = list(load_predictor(str(result.directory / "model"))(["bara bare", "cela doro"]))
    assert [set(r) for r in records] == [{"label", "scores"}] * 2
