"""What the tests of priors share."""


def scales(model):
    return {
        site: float(model.net.get_submodule(path).__getattr__(f"{name}_prior")().base_dist.scale.flatten()[0])
        for site, (path, name) in model._sites.items()
    }
