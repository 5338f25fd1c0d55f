"""Which reference a policy starts at."""

from dataclasses import replace

from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.reference import ReferenceConfig, starts_at_reference


def test_another_revision_of_the_same_path_is_another_reference() -> None:
    policy = PolicyConfig(path="folder")
    assert starts_at_reference(policy, ReferenceConfig())
    assert starts_at_reference(policy, ReferenceConfig(path="folder"))
    tagged = replace(policy, revision="v2")
    assert starts_at_reference(tagged, ReferenceConfig())
    assert not starts_at_reference(tagged, ReferenceConfig(path="folder")), "without a revision it is the main branch"
    assert not starts_at_reference(replace(policy, init="random"), ReferenceConfig(path="folder"))
