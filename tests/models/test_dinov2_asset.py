"""DINOv2-small, real weights out of an ONNX file, by our own path: what it sees."""

import jax
import numpy as np
import pytest

from sft_jax import assets
from sft_jax.models.family import Head, build_model, load_model
from sft_jax.weights.files import find, open_checkpoint

HOME = assets.cache() / f"dinov2-{assets.ASSETS['dinov2'].sha256[:12]}"
pytestmark = pytest.mark.skipif(not HOME.is_dir(), reason="asset:dinov2 is not in the cache; fetch it by using it once")
# The first numbers of the class token and of the mean of the patches, as onnxruntime 1.32 finds them by the program of
# the file that the weights came in.
CLS = [0.06988630443811417, -0.7369381189346313, 1.7017868757247925, -3.454540967941284]
MEAN = [0.47742074728012085, 0.2808939516544342, 0.796431839466095, -3.5464580059051514]


def test_what_it_sees():
    """R57: an image of 224 pixels, other than what its positions are for, has the features that it has elsewhere."""
    checkpoint = open_checkpoint(find(str(HOME)))
    model = build_model(checkpoint.config, Head("image_classification", 2), "asset:dinov2")
    matched, params = load_model(model, checkpoint)
    assert matched.initialised == ("head/out/kernel", "head/out/bias") and not matched.ignored
    head = model.template.initial(jax.random.key(0), matched.initialised)
    image = np.sin(np.arange(224 * 224 * 3) / 7).reshape(1, 224, 224, 3).astype(np.float32)
    features = jax.jit(lambda p, b: model.template.bind(p).features(b, None))
    found = np.asarray(features({**params, **head}, {"pixel_values": image}))[0, 0]
    assert np.abs(found[:4] - CLS).max() < 1e-4 and np.abs(found[384:388] - MEAN).max() < 1e-4
