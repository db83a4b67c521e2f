//! What the tests of this crate share: image files, imports, and byte-for-byte comparison.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, Disk, FetchError, Geometry, Priority};
use image::{ImageVolume, ImportError, ImportProgress, ImportRequest, Imported, Keep, OriginImage};
use tempfile::TempDir;
use testkit::foreign::tool_in;
use tokio::runtime::Runtime;

/// Size of the reference disk: three pages of hashes, and an end within a chunk.
pub(crate) const SIZE_BYTES: u64 = 300 * MIB + 37 * 512;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const CHUNK: u64 = block::limits::CHUNK_BYTES as u64;

/// Bytes that look random, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(len).collect()
}

/// A runtime for what is tested from a thread that may block.
pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runs `qemu-img` in a directory; the words are separated by blanks.
pub(crate) fn qemu_img(dir: &Path, words: &str) {
    tool_in(dir, "qemu-utils", "qemu-img", &words.split_whitespace().collect::<Vec<_>>());
}

/// A directory with image files, and beside it one for imported images.
pub(crate) struct Bench {
    tmp: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("files")).unwrap();
        Bench { tmp }
    }

    /// The same, with the reference disk as `disk.raw`: data at the start, across the boundary of two pages, at
    /// odd offsets, repeated, and in the last bytes.
    pub(crate) fn with_reference() -> Bench {
        let bench = Bench::new();
        let disk = File::create(bench.file("disk.raw")).unwrap();
        disk.set_len(SIZE_BYTES).unwrap();
        disk.write_all_at(&noise(1, 200_000), 0).unwrap();
        disk.write_all_at(&noise(2, 3_000_000), 128 * MIB - 1_000_000).unwrap();
        disk.write_all_at(&[0xff; 1 << 20], 200 * MIB).unwrap();
        disk.write_all_at(b"a few bytes in a hole", 250 * MIB + 4097).unwrap();
        disk.write_all_at(&noise(3, 512), SIZE_BYTES - 512).unwrap();
        bench
    }

    /// The directory of the image files.
    pub(crate) fn files(&self) -> PathBuf {
        self.tmp.path().join("files")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.files().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.file(name), bytes).unwrap();
        self.file(name)
    }

    /// A directory beside that of the image files.
    pub(crate) fn outside(&self) -> PathBuf {
        let dir = self.tmp.path().join("outside");
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.tmp.path().join("images")
    }

    /// What stands in the directory of images, finished or not.
    pub(crate) fn images_entries(&self) -> usize {
        fs::read_dir(self.images()).map_or(0, Iterator::count)
    }

    pub(crate) fn qemu_img(&self, words: &str) {
        qemu_img(&self.files(), words);
    }

    /// Has `qemu-io` carry out one command on an image.
    pub(crate) fn qemu_io(&self, command: &str, name: &str) {
        tool_in(&self.files(), "qemu-utils", "qemu-io", &["-c", command, name]);
    }

    pub(crate) fn request(&self, name: &str) -> ImportRequest {
        ImportRequest { file: self.file(name), format: None, allowed_dirs: Vec::new(), keep: Keep::InPlace }
    }

    pub(crate) fn try_import(&self, request: &ImportRequest) -> Result<Imported, ImportError> {
        image::import(request, &self.images(), &ImportProgress::default())
    }

    pub(crate) fn import(&self, name: &str) -> Imported {
        self.try_import(&self.request(name)).unwrap_or_else(|error| panic!("importing {name}: {error}"))
    }
}

/// An image volume straight over the origin of an imported image.
pub(crate) fn volume(imported: &Imported) -> ImageVolume {
    let origin = OriginImage::open(&imported.dir).unwrap();
    ImageVolume::new(origin.root().clone(), Arc::new(origin))
}

/// A source that cannot be asked.
pub(crate) struct Unreachable;

impl ChunkSource for Unreachable {
    fn fetch(&self, _: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        Box::pin(std::future::ready(Err(FetchError::Unreachable("no route".to_owned()))))
    }
}

/// Reads the whole volume, in pieces that are aligned to nothing, and compares it with a raw file.
pub(crate) async fn assert_same(volume: &dyn Disk, raw: &Path, what: &str) {
    let raw = File::open(raw).unwrap();
    let size_bytes = raw.metadata().unwrap().len();
    assert_eq!(volume.size_bytes(), size_bytes, "size of {what}");
    let piece = (2 * MIB + 12_345) as usize;
    let (mut expected, mut actual) = (vec![0; piece], vec![1; piece]);
    let mut at = 0;
    while at < size_bytes {
        let len = piece.min((size_bytes - at) as usize);
        raw.read_exact_at(&mut expected[..len], at).unwrap();
        volume.read(at, &mut actual[..len]).await.unwrap_or_else(|e| panic!("reading {what} at {at}: {e}"));
        if let Some(wrong) = (0..len).find(|&i| expected[i] != actual[i]) {
            panic!("{what} differs at byte {}: {:?}", at + wrong as u64, Geometry::split(at, len).next());
        }
        at += len as u64;
    }
}
