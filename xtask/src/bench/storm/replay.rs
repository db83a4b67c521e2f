//! One guest's boot, replayed against its disk.
//!
//! Requests go out one after the other, as they did when the boot was recorded. How long the guest computed
//! between an answer and its next request is not in the recording; what is, is the time from start to start.
//! So a request starts that long after the start of the one before, times `think`, or as soon as the one
//! before is answered, if that is later. A late timer does not add up: the next pause is counted from when
//! the request should have started.
//!
//! Each read is compared at a few words. Retries are the NBD client's: it reconnects for ever, so an error
//! here is one that a guest would have seen.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::Disk;
use tokio::time::Instant;

use super::content::{WORD_BYTES, fill, word};
use super::histogram::Histogram;
use super::trace::{Action, From, Probe, Trace};

/// A read that takes longer is a stall: a guest's user would notice.
pub(super) const STALL: Duration = Duration::from_millis(100);

/// How late a request may start and be counted as in time: the runtime's clock ticks once a millisecond.
const LATENESS: Duration = Duration::from_millis(2);

/// Reads that take longer are remembered one by one, to be laid beside what happened meanwhile.
const SLOW: Duration = Duration::from_millis(20);

/// Slow reads that are remembered of a VM: more tell nothing new.
const SLOW_READS_MAX: usize = 4096;

/// What all guests of a storm do.
pub(super) struct Script {
    pub(super) trace: Trace,
    /// Factor of the recorded pauses; 0 leaves them out.
    pub(super) think: f64,
    /// Of the image's bytes.
    pub(super) seed: u64,
    pub(super) writes: Writes,
}

/// Where a guest's writes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writes {
    /// To its disk.
    ToDisk,
    /// Nowhere: its disk is read-only and shared with other guests. Reads of what it wrote are not sent
    /// either, as if it had a layer of its own in memory that costs nothing.
    Kept,
}

/// What one guest met.
#[derive(Debug, Clone)]
pub(super) struct Played {
    pub(super) latencies: Histogram,
    /// Time beyond [`STALL`], of all reads.
    pub(super) stalled: Duration,
    pub(super) longest: Duration,
    pub(super) slow: Vec<SlowRead>,
    /// Requests that failed.
    pub(super) errors: u64,
    /// Reads that gave other bytes than expected.
    pub(super) wrong: u64,
    /// The first of both, in words.
    pub(super) complaint: Option<String>,
}

/// A read that took long.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlowRead {
    pub(super) began: Instant,
    pub(super) took: Duration,
}

impl Played {
    pub(super) fn new() -> Played {
        Played {
            latencies: Histogram::new(),
            stalled: Duration::ZERO,
            longest: Duration::ZERO,
            slow: Vec::new(),
            errors: 0,
            wrong: 0,
            complaint: None,
        }
    }

    fn note_read(&mut self, began: Instant) {
        let took = began.elapsed();
        self.latencies.add(took);
        self.stalled += took.saturating_sub(STALL);
        self.longest = self.longest.max(took);
        if took > SLOW && self.slow.len() < SLOW_READS_MAX {
            self.slow.push(SlowRead { began, took });
        }
    }

    fn complain(&mut self, what: impl FnOnce() -> String) {
        self.complaint.get_or_insert_with(what);
    }
}

/// Replays the whole script on `disk`. `vm` makes this guest's writes differ from those of others; `reads`
/// counts reads as they are done. Dropped in the middle, `played` holds what was done so far.
pub(super) async fn play(disk: &dyn Disk, script: &Script, vm: u64, reads: &AtomicU64, played: &mut Played) {
    let own_seed = word(script.seed, u64::MAX - vm);
    let mut buf = Vec::new();
    let mut due = Instant::now();
    for step in &script.trace.steps {
        due += Duration::from_micros((step.gap_us as f64 * script.think) as u64);
        let now = Instant::now();
        if due > now {
            tokio::time::sleep_until(due).await;
        } else if now - due > LATENESS {
            due = now;
        }
        let result = match &step.action {
            Action::Read { offset, len, probes, from } => {
                reads.fetch_add(1, Ordering::Relaxed);
                if script.writes == Writes::Kept && *from == From::Overlay {
                    continue;
                }
                buf.resize(*len as usize, 0);
                let began = Instant::now();
                let result = disk.read(*offset, &mut buf).await;
                played.note_read(began);
                if result.is_ok() {
                    check(script, own_seed, *offset, &buf, probes, played);
                }
                result
            }
            Action::Write { .. } | Action::Flush if script.writes == Writes::Kept => Ok(()),
            Action::Write { offset, len, tag } => {
                buf.resize(*len as usize, 0);
                fill(word(own_seed, (*tag).into()), *offset, &mut buf);
                disk.write(*offset, &buf).await
            }
            Action::Flush => disk.flush().await,
        };
        if let Err(error) = result {
            played.errors += 1;
            played.complain(|| format!("{:?}: {error}", step.action));
        }
    }
}

fn check(script: &Script, own_seed: u64, offset: u64, buf: &[u8], probes: &[Probe], played: &mut Played) {
    for probe in probes {
        let seed = match probe.tag {
            Some(_) if script.writes == Writes::Kept => continue,
            Some(tag) => word(own_seed, tag.into()),
            None => script.seed,
        };
        let at = (probe.offset - offset) as usize;
        let found = u64::from_le_bytes(buf[at..at + 8].try_into().expect("a word has eight bytes"));
        let expected = word(seed, probe.offset / WORD_BYTES);
        if found != expected {
            played.wrong += 1;
            played.complain(|| {
                format!("the word at byte {} is {found:#x} and should be {expected:#x}", probe.offset)
            });
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use block::Access;
    use testkit::memory_disk::{MemoryDisk, Pace};

    use super::*;

    /// A disk in memory that holds the image and takes writes.
    fn disk_with_image(seed: u64, trace: &Trace) -> Arc<MemoryDisk> {
        let mut bytes = vec![0; trace.disk_bytes as usize];
        for chunk in trace.chunks_in_order().into_iter().collect::<BTreeSet<_>>() {
            let range = (chunk * 65536) as usize..(((chunk + 1) * 65536).min(trace.disk_bytes)) as usize;
            fill(seed, chunk * 65536, &mut bytes[range]);
        }
        MemoryDisk::with(bytes, Pace::Later, Access::ReadWrite)
    }

    const TEXT: &str = "0,R,0,4096\n50,W,512,1024\n90,R,0,4096\n99,R,512,1024\n99,F,0,0";

    async fn play_on(disk: &MemoryDisk, seed: u64, writes: Writes) -> (Played, u64) {
        let trace = super::super::trace::tests_parse(TEXT, 65536);
        let script = Script { trace, think: 1.0, seed, writes };
        let (reads, mut played) = (AtomicU64::new(0), Played::new());
        play(disk, &script, 3, &reads, &mut played).await;
        (played, reads.into_inner())
    }

    #[tokio::test]
    async fn a_guest_finds_the_image_and_its_own_writes() {
        let trace = super::super::trace::tests_parse(TEXT, 65536);
        for writes in [Writes::ToDisk, Writes::Kept] {
            let disk = disk_with_image(9, &trace);
            let (played, reads) = play_on(&disk, 9, writes).await;
            assert_eq!((played.errors, played.wrong, reads), (0, 0, 3), "{:?}", played.complaint);
            // The image's own bytes are gone where the guest wrote.
            assert_eq!(
                disk.bytes.lock().unwrap()[512..520] == word(9, 64).to_le_bytes(),
                writes == Writes::Kept
            );
        }
    }

    #[tokio::test]
    async fn another_images_bytes_are_noticed() {
        let trace = super::super::trace::tests_parse(TEXT, 65536);
        let (played, _) = play_on(&disk_with_image(8, &trace), 9, Writes::ToDisk).await;
        assert_eq!(played.wrong, 2, "the read of its own writes is right");
        assert!(played.complaint.unwrap().contains("byte 0 "));
    }
}
