"""Who reaches whom, by the rules that Kubernetes states for policies: in our namespace nobody, but for what follows."""

import pytest
import yaml

from pipelines.manifests.base import base_objects
from tests.k8s.kustomizations import K8S, Object, build, of_kind
from tests.network import End, allowed
from zhllama.kubernetes.model_server import CLIENTS_LABEL
from zhllama.kubernetes.network_policy import S3Network

OUTSIDE = End(address="203.0.113.9")
DNS = End({"k8s-app": "kube-dns"}, namespace="kube-system")
KFP = End({"app": "ml-pipeline"}, namespace="kubeflow")
API_SERVER = End(address="198.51.100.1")
STEP = End({"workflows.argoproj.io/workflow": "adapt-llama-x7", "pipelines.kubeflow.org/v2_component": "true"})
REAPER = End({"zhllama.io/part": "reaper"})
RUNNER = End({"zhllama.io/part": "runner"})
STRANGER = End({"app": "somebody-elses"})


def policies(objects: list[Object]) -> list[Object]:
    return list(of_kind(objects, "NetworkPolicy").values())


def rendered(path: str) -> list[Object]:
    """The policies of a rendered manifest, in our namespace."""
    found = [one for one in yaml.safe_load_all((K8S / path).read_text()) if one["kind"] == "NetworkPolicy"]
    return [{**one, "metadata": {**one["metadata"], "namespace": "zhllama"}} for one in found]


def pod_of(path: str, kind: str) -> End:
    (value,) = [one for one in yaml.safe_load_all((K8S / path).read_text()) if one["kind"] == kind]
    spec = value["spec"]
    if kind == "PyTorchJob":
        return End(spec["pytorchReplicaSpecs"]["Master"]["template"]["metadata"]["labels"])
    return End(spec["predictor"]["labels"] if kind == "InferenceService" else spec["template"]["metadata"]["labels"])


@pytest.fixture(scope="module")
def ours(cluster: list[Object]) -> list[Object]:
    """The cluster overlay's policies, a training's and a served model's."""
    return [*policies(cluster), *rendered("pytorchjob/13b/lora.yaml"), *rendered("serving/13b/vllm.yaml")]


TRAINING = pod_of("pytorchjob/13b/lora.yaml", "PyTorchJob")
SERVER = pod_of("serving/13b/vllm.yaml", "Deployment")


def test_a_pod_that_nobody_speaks_for_reaches_nobody_and_is_reached_by_nobody(ours):
    for port in (53, 80, 443, 8000, 8333):
        assert not allowed(ours, STRANGER, OUTSIDE, port)
        for other in (STEP, TRAINING, REAPER, RUNNER):
            assert not allowed(ours, STRANGER, other, port)
            assert not allowed(ours, other, STRANGER, port)


@pytest.mark.parametrize("pod", [STEP, REAPER, RUNNER, TRAINING, SERVER], ids=repr)
def test_each_of_ours_gets_names(ours, pod):
    for protocol in ("UDP", "TCP"):
        for port in (53, 5353):
            assert allowed(ours, pod, DNS, port, protocol)


@pytest.mark.parametrize("pod", [STEP, REAPER, RUNNER, TRAINING, SERVER], ids=repr)
def test_names_are_asked_of_the_clusters_dns_alone(ours, pod):
    for there in (End({"dns": "default"}, namespace="openshift-dns"), End(address="169.254.20.10")):
        assert allowed(ours, pod, there, 5353, "UDP")
    strangers = (OUTSIDE, End({"k8s-app": "kube-dns"}, namespace="team"), End({"app": "x"}, namespace="kube-system"))
    for other in strangers:
        assert not allowed(ours, pod, other, 53, "UDP")
    opened = [*ours, *yaml.safe_load_all((K8S / "components/open-network/network-policy.yaml").read_text())]
    assert allowed(opened, pod, OUTSIDE, 53, "UDP")
    assert not allowed(opened, STRANGER, OUTSIDE, 53, "UDP")


def test_the_base_is_narrowed_to_where_s3_and_the_api_server_are():
    s3 = S3Network(ports=(7480,), cidrs=("192.0.2.0/24",), dns=("203.0.113.9/32",))
    found = policies(base_objects(s3=s3, api_cidrs=["198.51.100.0/24"]))
    store = End(address="192.0.2.7")
    for pod in (STEP, RUNNER):
        assert allowed(found, pod, store, 7480)
        assert allowed(found, pod, API_SERVER, 6443)
        assert allowed(found, pod, OUTSIDE, 53, "UDP")
        for target, port in (
            (OUTSIDE, 443),
            (store, 6443),
            (OUTSIDE, 6443),
            (End({"a": "b"}, namespace="minio"), 9000),
        ):
            assert not allowed(found, pod, target, port)
    assert allowed(found, STEP, KFP, 8887)
    assert not allowed(found, REAPER, store, 7480)


def test_the_base_opens_nothing_to_every_address():
    found = policies(build("base")) + policies(build("components/reaper"))
    found += [*rendered("pytorchjob/13b/lora.yaml"), *rendered("serving/13b/vllm.yaml")]
    for pod in (STEP, RUNNER, REAPER, TRAINING, SERVER):
        for port in range(1, 10_000):
            assert not allowed(found, pod, OUTSIDE, port), (pod, port)


@pytest.mark.parametrize("namespace", ["", "team-a"])
def test_what_is_named_is_no_more_open_to_every_address(namespace):
    more = {"namespace": namespace, "with_namespace": not namespace}
    s3 = S3Network(namespaces=("minio",))
    found = policies(base_objects(s3=s3, api_cidrs=["198.51.100.0/24"], **more))
    assert [one for one in found if "https" in one["metadata"]["name"]] == []
    half = policies(base_objects(s3=s3, **more))
    reaper = End(REAPER.labels, namespace=namespace or "zhllama")
    assert allowed(half, reaper, OUTSIDE, 6443)
    assert allowed(found, reaper, API_SERVER, 6443)
    assert not allowed(found, reaper, OUTSIDE, 6443)


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({"components": ["admission"]}, True),
        ({"components": ["admission"], "api_cidrs": ["198.51.100.0/24"]}, False),
        ({"components": ["open-https"]}, False),
        ({}, False),
    ],
)
def test_a_base_in_which_nobody_reaches_the_api_server_is_warned_of(given, warned, caplog):
    base_objects(**given)
    assert ("nobody reaches the API server" in caplog.text) is warned


def test_a_step_reaches_s3_the_api_server_kfp_and_a_served_model(ours):
    for port in (443, 8333, 9000):
        assert allowed(ours, STEP, OUTSIDE, port) is (port == 443)
        assert allowed(ours, STEP, End({"app": "minio"}, namespace="minio"), port)
    for port in (443, 6443, 8443):
        assert allowed(ours, STEP, API_SERVER, port)
    for port in (8887, 8888, 8080):
        assert allowed(ours, STEP, KFP, port)
        assert not allowed(ours, STEP, End({"app": "ml-pipeline"}, namespace="elsewhere"), port)
    assert allowed(ours, STEP, SERVER, 8000)
    for port in (22, 80, 3306, 10250):
        assert not allowed(ours, STEP, OUTSIDE, port)
    # nobody asks a step anything, not even another
    assert not allowed(ours, STEP, STEP, 443)
    assert not allowed(ours, KFP, STEP, 443)


def test_the_reaper_and_a_runner_reach_the_api_server_and_only_the_runner_s3(ours):
    for port in (443, 6443, 8443):
        assert allowed(ours, REAPER, API_SERVER, port)
        assert allowed(ours, RUNNER, API_SERVER, port)
    for port in (8333, 9000):
        assert not allowed(ours, REAPER, OUTSIDE, port)
        assert allowed(ours, RUNNER, End({"app": "minio"}, namespace="minio"), port)
    assert allowed(ours, RUNNER, SERVER, 8000)


def test_a_training_reaches_its_own_pods_and_s3_and_no_api_server(ours):
    assert allowed(ours, TRAINING, TRAINING, 29400)
    assert allowed(ours, TRAINING, End({"app": "minio"}, namespace="storage"), 9000)
    # HTTPS by the overlay's choice
    for port in (443, 8333, 9000):
        assert allowed(ours, TRAINING, OUTSIDE, port) is (port == 443)
    for port in (6443, 8443, 8000):
        assert not allowed(ours, TRAINING, API_SERVER, port)
    assert not allowed(ours, STEP, TRAINING, 23456)
    sibling = pod_of("pytorchjob/13b/sft.yaml", "PyTorchJob")
    both = [*ours, *rendered("pytorchjob/13b/sft.yaml")]
    assert not allowed(both, TRAINING, sibling, 443)


@pytest.mark.parametrize("kind", ["Deployment", "InferenceService"])
def test_a_served_model_is_asked_by_labelled_pods_and_namespaces_and_by_who_deploys(cluster, kind):
    path = f"serving/13b/{'vllm' if kind == 'Deployment' else 'kserve'}.yaml"
    all_of_them = [*policies(cluster), *rendered(path)]
    pod = pod_of(path, kind)
    gateway = End({"app": "gateway"}, namespace="gateways", namespace_labels={CLIENTS_LABEL: "true"})
    assert allowed(all_of_them, gateway, pod, 8000)
    assert allowed(all_of_them, STEP, pod, 8000)
    in_it = [one for one in all_of_them if one["metadata"]["name"] != "zhllama-deny"]
    assert allowed(in_it, End({CLIENTS_LABEL: "true"}), pod, 8000)
    for labels in ({"app": "x"}, {CLIENTS_LABEL: "false"}, {"zhllama.io/stage": "lora"}):
        assert not allowed(in_it, End(labels), pod, 8000)
    assert not allowed(all_of_them, End({"app": "x"}, namespace="elsewhere"), pod, 8000)
    assert not allowed(all_of_them, gateway, pod, 22)
    assert allowed(all_of_them, pod, OUTSIDE, 443)
    assert not allowed(all_of_them, pod, API_SERVER, 6443)


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["overlays/profile", "overlays/kfp-standalone"])
def test_in_a_namespace_of_others_their_pods_are_as_they_were(name):
    objects = build(name)
    namespace = policies(objects)[0]["metadata"]["namespace"]

    def there(end: End) -> End:
        return End(end.labels, namespace=namespace)

    for pod in (STRANGER, STEP):
        assert allowed(policies(objects), there(pod), OUTSIDE, 3306)
        assert allowed(policies(objects), OUTSIDE, there(pod), 80)
    assert allowed(policies(objects), there(REAPER), API_SERVER, 443)
    # a training without a policy of its own has no network there either, but for the overlay's choice of HTTPS
    for port in (443, 9000):
        assert allowed(policies(objects), there(TRAINING), OUTSIDE, port) is (port == 443)
    assert not allowed(policies(objects), there(STRANGER), there(TRAINING), 80)


def test_seaweedfs_gives_s3_to_the_namespace_and_to_kfp_and_its_other_ports_to_nobody():
    found = policies(build("dev"))
    store = End({"app.kubernetes.io/name": "seaweedfs"})
    for pod in (STEP, KFP, RUNNER):
        assert allowed(found, pod, store, 8333)
    assert allowed([*found, *rendered("pytorchjob/13b/lora.yaml")], TRAINING, store, 8333)
    for port in (8888, 9333, 9340):
        for pod in (STEP, KFP, RUNNER, STRANGER):
            assert not allowed(found, pod, store, port)
    assert not allowed(found, STEP, End({"app.kubernetes.io/name": "seaweedfs"}, namespace="elsewhere"), 8888)
    assert not allowed(found, store, OUTSIDE, 443)
