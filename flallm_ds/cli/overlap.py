"""`flallm overlap`: clips of a shard folder that another one has, too."""

from flallm_ds.data.index import load_index
from flallm_ds.data.overlap import overlap as find_overlap


def overlap(a: str, b: str, *, split_a: str = "train", split_b: str = "test") -> None:
    """Count the clips of B that are also in A: known to a model that was trained on A.

    Compares ids, source videos and texts. A and B may be the same folder.

    Example: flallm overlap data/openasl data/how2sign

    Options:
        a: a shard folder
        b: another one, or the same
        split_a: the split of A
        split_b: the split of B
    """
    first, second = load_index(a, split_a), load_index(b, split_b)
    found = find_overlap(first, second)
    print(f"{found.num_clips:,} clips of {split_b} in {b}, compared with {split_a} in {a}:")
    same = f" ({found.examples})" if found.same_clips else ""
    print(f"  the same clip    {len(found.same_clips):>9,}{same}")
    print(f"  the same id      {found.num_ids:>9,}")
    print(f"  a known video    {found.num_videos:>9,}")
    print(f"  a known text     {found.num_texts:>9,}")
