"""The reference alignment loss inside a training loop of your own: no branch, no pipeline, any network with tokens.

python examples/alignment_loss.py

Here the "network" is a linear layer on random tokens and the "teacher" is fixed random features, so that it runs
anywhere in seconds. In yours, `student` are the reference tokens after a block, and `teacher` comes from
`refalign_adapter.teachers.base.load_teacher("facebook/dinov2-base").encode(images, grid=(h, w))`.
"""

import torch

import refalign_adapter as ra
from refalign_adapter.alignment.projector import Projectors

BLOCK, DIM, TEACHER_DIM = 0, 32, 24
SAMPLES, REFERENCES, TOKENS = 4, 3, 16


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(SAMPLES, REFERENCES, TOKENS, DIM, generator=generator)
    teacher = torch.randn(SAMPLES, REFERENCES, TOKENS, TEACHER_DIM, generator=generator)
    mask = torch.ones(SAMPLES, REFERENCES, dtype=torch.bool)
    mask[3, 2] = False  # the last sample has two references, the third is padding
    subjects = torch.arange(REFERENCES).repeat(SAMPLES, 1)
    subjects[0, 1] = subjects[0, 0]  # two views of one subject are not pushed apart

    network = torch.nn.Linear(DIM, DIM)
    projectors = Projectors([BLOCK], DIM, {"teacher": TEACHER_DIM})
    optimizer = torch.optim.AdamW([*network.parameters(), *projectors.parameters()], lr=3e-3)
    for step in range(201):
        student = projectors({BLOCK: network(tokens)})[BLOCK]["teacher"]
        loss = ra.reference_alignment_loss(student, teacher, negative_margin=1.0, mask=mask, subjects=subjects)
        optimizer.zero_grad()
        loss.total.backward()  # in yours: (your_loss + weight * loss.total).backward()
        optimizer.step()
        if step % 50 == 0:
            parts = f"positive {loss.positive.item():.3f}, negative {loss.negative.item():.3f}"
            print(f"step {step}: total {loss.total.item():.3f} ({parts})")


if __name__ == "__main__":
    main()
