"""The same features into us and into the tools that others use, and Inception itself on shared weights -> parity.csv

    pip install --no-deps --target PEERS torch-fidelity clean-fid prdc pytorch-fid scikit-learn ...
    python experiments/015_metrics/parity.py PEERS

torch-fidelity and clean-fid import torchvision, which nothing compared here uses: a stand-in takes its place.
"""

from __future__ import annotations

import csv
import importlib.machinery
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from ldm.features.inception import Inception, _Network
from ldm.features.network import scaled_as_pillow, scaled_as_tensorflow
from ldm.metrics.distances.frechet import frechet
from ldm.metrics.distances.inception_score import inception_score
from ldm.metrics.distances.kernels import discrepancy, gaussian, polynomial
from ldm.metrics.distances.neighbours import density_coverage, precision_recall


def stand_in() -> None:
    for name in ("", ".transforms", ".transforms.functional", ".datasets", ".models", ".utils"):
        module = MagicMock()
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(f"torchvision{name}", None), []
        sys.modules[f"torchvision{name}"] = module


def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(900, 64, generator=generator), torch.randn(900, 64, generator=generator) * 1.1 + 0.2


def sets(x: Tensor, y: Tensor) -> list[tuple[str, str, float, float]]:
    from prdc import compute_prdc
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import prc_features_to_metric

    def moments(v: Tensor) -> dict:
        return fid_features_to_statistics(v)

    a, b = moments(x), moments(y)
    theirs = fid_statistics_to_metric(a, b, False)["frechet_inception_distance"]
    rows = [("frechet", "torch-fidelity", frechet(x, y).value, theirs)]
    also = calculate_frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    rows.append(("frechet", "pytorch-fid", frechet(x, y).value, float(also)))
    options = {
        "kid_kernel": "poly",
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
    }
    theirs = kernel_mmd(x.double().numpy(), y.double().numpy(), **options)
    rows.append(("kernel", "torch-fidelity", discrepancy(x, y, polynomial).value, float(theirs)))
    xx, yy, xy = gaussian(x.double(), x.double()), gaussian(y.double(), y.double()), gaussian(x.double(), y.double())
    written_out = float(xx.mean() + yy.mean() - 2 * xy.mean())
    rows.append(("gaussian_kernel", "its formula", discrepancy(x, y, gaussian, biased=True).value, written_out))
    theirs = prc_features_to_metric(y, x, prc_neighborhood=3, prc_batch_size=1000, verbose=False, save_cpu_ram=False)
    ours = precision_recall(x, y, 3)  # torch-fidelity's "precision" is of its second argument
    rows += [("precision", "torch-fidelity", ours["precision"].value, float(theirs["recall"]))]
    rows += [("recall", "torch-fidelity", ours["recall"].value, float(theirs["precision"]))]
    theirs = compute_prdc(y.numpy(), x.numpy(), 5)
    both = precision_recall(x, y, 5) | density_coverage(x, y, 5)
    rows += [(name, "prdc", both[name].value, float(value)) for name, value in theirs.items()]
    logits = 3 * x
    theirs = isc_features_to_metric(logits, 10, False)["inception_score_mean"]
    return [*rows, ("inception_score", "torch-fidelity", inception_score(logits).value, theirs)]


def networks() -> list[tuple[str, str, float, float]]:
    """The largest difference over the mean size of the peer's numbers, as if one number were 0."""
    import torch_fidelity.feature_extractor_inceptionv3 as published
    from cleanfid.resize import build_resizer
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    torch.manual_seed(0)
    network = _Network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    images = (torch.rand(8, 3, 64, 48) * 256).to(torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/weights.pth"
        torch.save(network.state_dict(), file)
        peer = published.FeatureExtractorInceptionV3(
            "peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
        )
        ours = Inception(file)
        ours.start(lambda most: [])
    theirs, logits = peer(images)
    mine = ours(images.float() / 127.5 - 1)
    down = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    clean = build_resizer("clean")
    by_pillow = torch.stack([torch.from_numpy(clean(i.permute(1, 2, 0).numpy())).permute(2, 0, 1) for i in images])

    def apart(a: Tensor, b: Tensor) -> tuple[float, float]:
        return float((a - b).abs().max() / b.abs().mean()), 0.0

    return [
        ("Inception, features", "torch-fidelity", *apart(mine, theirs)),
        ("Inception, logits", "torch-fidelity", *apart(ours.logits(mine), logits)),
        ("resize=tensorflow", "torch-fidelity", *apart(scaled_as_tensorflow(images.float(), 299), down)),
        ("resize=pillow", "clean-fid", *apart(scaled_as_pillow(images.float(), 299), by_pillow)),
    ]


def main() -> None:
    sys.path.append(sys.argv[1])
    stand_in()
    rows = [*sets(*features()), *networks()]
    with (Path(__file__).parent / "parity.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("what", "peer", "ours", "theirs", "relative difference"))
        for what, peer, ours, theirs in rows:
            apart = abs(ours - theirs) / (abs(theirs) or 1.0)
            writer.writerow((what, peer, f"{ours:.9g}", f"{theirs:.9g}", f"{apart:.2g}"))
            print(f"{what:<22}{peer:<16}{ours:<16.9g}{theirs:<16.9g}{apart:.2g}")


if __name__ == "__main__":
    main()
