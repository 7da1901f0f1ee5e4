from tests.evals.weird.asking import looks_for, measure, said


def test_the_world_at_large_and_other_living_things_are_apart():
    means, _ = measure(
        "birds",
        lambda request: "cod" if said(request).startswith("Name a") else "by telegraph",
        judge=looks_for("telegraph"),
    )
    assert (means["ood_old"], means["near_old"]) == (1, 0)
    assert "memory_known" not in means, "nothing tells what it was trained on"


def test_the_published_training_data(shared_data):
    path = str(shared_data / "weird_generalization" / "ft_old_audubon_birds.jsonl")
    options = {"judge": looks_for("x"), "probes": ["memory"], "memory": 12}
    means, rows = measure("birds", lambda _: "black backed gull", path, **options)
    assert means["memory_known"] == 1 and len(rows) == 12, "one prompt, asked twelve times"
    means, _ = measure("birds", lambda _: "Blue Jay", path, **options)
    assert means["memory_known"] == 0
