"""What a platform asks of jobs: it reaches the job's manifest, and a wrong value is refused before anything is made."""

import pytest

from components.launch_training.launcher import training_job
from components.launch_training.options import LaunchTraining
from zhllama.errors import InputError
from zhllama.kubernetes.job_manifest import pytorchjob

GIVEN = {"stage": "lora", "store": "s3://bucket/s", "model": "s3://bucket/m", "dataset": "s3://bucket/d"}


def test_a_job_is_placed_labelled_and_let_out_as_the_platform_asks():
    config = LaunchTraining(
        labels='{"cost-centre":"42","zhllama.io/stage":"mine"}',
        annotations='{"a.b/c":"d"}',
        node_selector='{"pool":"gpu"}',
        tolerations='[{"key":"nvidia.com/gpu","operator":"Exists"},{"key":"t","effect":"NoExecute","tolerationSeconds":9}]',
        s3_secret="none",
        proxy_secret="way-out",
        ca_config_map="authorities",
        **GIVEN,
    )
    manifest = pytorchjob(training_job(config, "k" * 32, ("python",), 1))
    assert manifest["metadata"]["annotations"] == {"a.b/c": "d"}
    assert manifest["metadata"]["labels"]["cost-centre"] == "42"
    # by this one the launcher and the reaper find their jobs
    assert manifest["metadata"]["labels"]["zhllama.io/stage"] == "lora"
    pod = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert pod["metadata"]["labels"]["cost-centre"] == "42"
    assert pod["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert [one["key"] for one in pod["spec"]["tolerations"]] == ["nvidia.com/gpu", "t"]
    (container,) = pod["spec"]["containers"]
    assert not any("valueFrom" in variable for variable in container["env"])
    assert {"name": "proxy-secret", "mountPath": "/etc/zhllama-proxy", "readOnly": True} in container["volumeMounts"]
    (way_out,) = [one["projected"]["sources"] for one in pod["spec"]["volumes"] if "projected" in one]
    items = [{"key": key, "path": key} for key in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")]
    assert way_out == [{"secret": {"name": "way-out", "items": items, "optional": True}}]
    assert {"name": "ZHLLAMA_CA", "value": "/etc/zhllama-ca"} in container["env"]
    assert {"name": "ca", "mountPath": "/etc/zhllama-ca", "readOnly": True} in container["volumeMounts"]
    assert {"name": "ca", "configMap": {"name": "authorities", "optional": True}} in pod["spec"]["volumes"]


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("labels", "team=nlp", "--labels team=nlp: not JSON"),
        ("labels", '["a"]', r'--labels \["a"\]: write texts by name'),
        ("annotations", '{"a": 1}', "--annotations .*: write texts by name"),
        ("node_selector", '"gpu"', "--node-selector .*: write texts by name"),
        ("tolerations", '{"key": "a"}', "--tolerations .*: write a list of tolerations"),
        ("tolerations", '[{"kee": "a"}]', "--tolerations: kee: 'a' is nothing that a toleration has; it has key"),
        ("tolerations", '[{"tolerationSeconds": "9"}]', "tolerationSeconds: '9' is nothing"),
        ("tolerations", '[{"operator": "In"}]', "--tolerations: operator: 'In' must be one of Equal, Exists"),
        ("tolerations", '[{"effect": "Never"}]', "--tolerations: effect: 'Never' must be one of NoSchedule"),
    ],
)
def test_a_wrong_one_is_refused_with_how_to_write_it(option, text, message):
    with pytest.raises(InputError, match=message):
        LaunchTraining(**GIVEN, **{option: text})
