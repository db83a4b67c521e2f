//! Records what a VM touches while it boots.
//!
//! A [`BootTap`] lies between a new VM's overlay and its image, so that it sees what the guest reads of the image
//! and not what it wrote itself, through whatever export it reads. The first read begins the recording.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use block::{Access, BoxFuture, ChunkIndex, Disk, DiskError, Extent, Priority, TryIo};
use image::{ImageVolume, Recorder};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Profile;

/// How often it is looked whether a boot is over.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A guest that touches nothing new for so long has booted. A Debian boot under emulation pauses for 7 s at most,
/// while it unpacks its initial ramdisk; twice that leaves room for slower hosts.
const QUIET: Duration = Duration::from_secs(15);

/// A boot is over after so long, whatever is read then: slow ones under emulation take a minute.
const RECORD_TIME_MAX: Duration = Duration::from_secs(180);

/// Fewer chunks are no boot, but somebody who looked at the disk: firmware, boot loader and kernel alone touch more.
pub(super) const RECORD_CHUNKS_MIN: usize = 64;

/// An image under a new VM's overlay, with an eye on what is read first.
pub(crate) struct BootTap {
    volume: Arc<ImageVolume>,
    profile: Arc<Profile>,
    /// Empty until the first read; then `None` if the boot is not recorded.
    recording: OnceLock<Option<Recording>>,
}

/// A boot that is being recorded. Dropping it ends the recording.
pub(super) struct Recording {
    recorder: Arc<Recorder>,
    _end: DropGuard,
}

impl Recording {
    /// A recording, and what says that it was dropped.
    pub(super) fn new() -> (Recording, Arc<Recorder>, CancellationToken) {
        let recorder = Arc::new(Recorder::new());
        let end = CancellationToken::new();
        let recording = Recording { recorder: Arc::clone(&recorder), _end: end.clone().drop_guard() };
        (recording, recorder, end)
    }
}

impl BootTap {
    pub(crate) fn new(volume: Arc<ImageVolume>, profile: Arc<Profile>) -> BootTap {
        BootTap { volume, profile, recording: OnceLock::new() }
    }

    fn note(&self, offset: u64, len: usize) {
        if let Some(recording) = self.recording.get_or_init(|| self.profile.begin_recording()) {
            recording.recorder.note(offset, len);
        }
    }
}

/// Waits until a boot is over: it is quiet, or takes too long, or the record is full, or the VM is gone.
pub(super) async fn until_over(recorder: &Recorder, gone: &CancellationToken) {
    let began = Instant::now();
    let (mut noted, mut last_touch) = (0, began);
    while recorder.is_open() && began.elapsed() < RECORD_TIME_MAX {
        if recorder.noted() > noted {
            (noted, last_touch) = (recorder.noted(), Instant::now());
        } else if noted >= RECORD_CHUNKS_MIN && last_touch.elapsed() >= QUIET {
            return;
        }
        tokio::select! {
            () = gone.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// What was recorded, without the chunks that are all zero: nobody ever fetches them.
pub(super) async fn recorded(recorder: &Recorder, volume: &ImageVolume) -> Vec<ChunkIndex> {
    recorder.close();
    let mut chunks = Vec::with_capacity(recorder.noted());
    for chunk in recorder.chunks() {
        // The guest has just been there, so the page is at hand. A chunk whose name cannot be had stays in.
        let name = volume.chunk_hash(chunk, Priority::Background).await;
        if chunk.0 < volume.root().chunk_count() && !name.is_ok_and(|name| name.is_zero()) {
            chunks.push(chunk);
        }
    }
    chunks
}

impl Disk for BootTap {
    fn size_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn access(&self) -> Access {
        self.volume.access()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        self.note(offset, buf.len());
        self.volume.try_read(offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        self.volume.try_write(offset, data)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.note(offset, buf.len());
        self.volume.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.volume.write(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.volume.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.volume.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        self.volume.flush()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.volume.extents(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use block::limits::CHUNK_BYTES;

    use super::*;

    fn touch(recorder: &Recorder, chunks: std::ops::Range<usize>) {
        chunks.for_each(|chunk| recorder.note((chunk * CHUNK_BYTES) as u64, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_boot_is_over_when_it_is_quiet_and_not_while_it_touches_more() {
        let (recorder, gone) = (Recorder::new(), CancellationToken::new());
        let began = Instant::now();
        let boot = async {
            for step in 0..20 {
                touch(&recorder, step * 10..step * 10 + 10);
                tokio::time::sleep(QUIET / 2).await;
            }
        };
        tokio::join!(until_over(&recorder, &gone), boot);
        let after = began.elapsed() - 19 * (QUIET / 2);
        assert!(after >= QUIET && after <= QUIET + 2 * LOOK_EVERY, "over {after:?} after the last touch");
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_at_the_disk_is_no_boot_and_ends_with_the_time() {
        let (recorder, gone) = (Recorder::new(), CancellationToken::new());
        touch(&recorder, 0..RECORD_CHUNKS_MIN - 1);
        let began = Instant::now();
        until_over(&recorder, &gone).await;
        assert_eq!(began.elapsed(), RECORD_TIME_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_record_or_a_vm_that_is_gone_ends_the_recording_at_once() {
        let began = Instant::now();
        let (recording, recorder, gone) = Recording::new();
        touch(&recorder, 0..100);
        drop(recording);
        until_over(&recorder, &gone).await;
        assert_eq!(began.elapsed(), Duration::ZERO);

        let (_recording, recorder, gone) = Recording::new();
        touch(&recorder, 0..image::PROFILE_CHUNKS_MAX + 1);
        until_over(&recorder, &gone).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
