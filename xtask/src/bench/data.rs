//! Image files to measure with.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

use super::Outcome;

/// Bytes written at a time, and the length of an island of data in a sparse file.
const PIECE_BYTES: u64 = 4 << 20;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filling {
    /// Random bytes throughout: nothing compresses, and no chunk comes twice.
    Random,
    /// Random bytes in one of so many pieces of 4 MiB, and holes else.
    Sparse(u64),
}

/// Makes a file of `len` bytes. Equal arguments give equal bytes, so that runs can be compared.
pub(super) fn make(path: &Path, len: u64, filling: Filling) -> Outcome {
    let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
    let file = File::create(path).map_err(failed)?;
    file.set_len(len).map_err(failed)?;
    let step = match filling {
        Filling::Random => 1,
        Filling::Sparse(one_in) => one_in,
    };
    let mut random = SmallRng::seed_from_u64(len);
    let mut piece = vec![0; PIECE_BYTES as usize];
    for at in (0..len).step_by((PIECE_BYTES * step) as usize) {
        random.fill_bytes(&mut piece);
        let bytes = (len - at).min(PIECE_BYTES) as usize;
        file.write_all_at(&piece[..bytes], at).map_err(failed)?;
    }
    file.sync_all().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_sparse_file_has_its_length_and_little_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        make(&path, 40 << 20, Filling::Sparse(5)).unwrap();
        let metadata = path.metadata().unwrap();
        assert_eq!(metadata.len(), 40 << 20);
        assert!(metadata.blocks() * 512 < 20 << 20, "{} blocks", metadata.blocks());
    }
}
