"""What every test starts from: two logical processors, no GPU, float32, fixed seeds."""

import os

import command  # noqa: F401  (sets what TensorFlow reads when it is imported)

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # tests compare digits, which TF32 and cuDNN would round; subprocesses too

# NumPy's products stay on one thread: spread over cores that the other process of the tests, or anything else, keeps
# busy, a small one waits for them, and takes up to 400 times as long. Before NumPy is imported; subprocesses too.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import keras
import pytest
import tensorflow as tf
from xdist.scheduler import LoadScopeScheduling

# Files whose fixtures cost seconds: one process runs all of such a file, or both would make them.
SLOW_FIXTURES = "app audit cases evaluate features generator phantom predict stages synthetic".split()
TOGETHER = tuple(f"tests/test_{name}.py" for name in SLOW_FIXTURES)

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: threads that wait for one would spin
    tf.config.threading.set_intra_op_parallelism_threads(1)
# Before TensorFlow starts: two devices on one processor, so that two-replica tests run anywhere.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


class FilesTogether(LoadScopeScheduling):
    """Tests go to whichever process is free, those of a file of TOGETHER to the same."""

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return file if file in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return FilesTogether(config, log)


def pytest_collection_modifyitems(items):
    """The longest first: begun last, one of them would keep everybody waiting."""
    items.sort(key=lambda item: ("two_replicas" not in item.name, item.nodeid.split("::")[0] not in TOGETHER))


@pytest.fixture(autouse=True)
def fresh_state():
    """Seeds before each test; the float32 policy before and after it."""
    keras.mixed_precision.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_dtype_policy("float32")


@pytest.fixture
def bfloat16(fresh_state):
    """The mixed_bfloat16 policy for one test."""
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
