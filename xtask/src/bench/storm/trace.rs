//! Recorded boots, made ready for replay: what is done after what pause, and what each read must find.
//!
//! All VMs of a storm replay one trace, so what a read must find is worked out once: at each of a few places
//! in it either the image's bytes or those of the last write before.

use std::collections::{BTreeSet, HashMap};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::super::Outcome;
use super::content::{CHUNK, WORD_BYTES};

/// A boot of Debian 12, recorded: see the head of the file.
const DEBIAN: &str = include_str!("../../../testdata/debian12-boot.csv");

/// Size of the disk that [`DEBIAN`] was recorded on.
const DEBIAN_DISK_BYTES: u64 = 4 << 30;

/// What writes are told apart by: no trace has writes of parts of a sector.
const SECTOR: u64 = 512;

/// Words of a read that are compared: its first, its last and one between.
const PROBES: usize = 3;

/// A boot, ready for replay.
#[derive(Debug, Clone)]
pub(super) struct Trace {
    pub(super) name: &'static str,
    pub(super) disk_bytes: u64,
    pub(super) steps: Vec<Step>,
}

/// One request of the guest.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// From the start of the request before to the start of this one, in microseconds.
    pub(super) gap_us: u64,
    pub(super) action: Action,
}

/// What is asked of the disk. Offsets and lengths are bytes and whole sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Read {
        offset: u64,
        len: u32,
        probes: [Probe; PROBES],
        from: From,
    },
    /// `tag` makes this write's bytes differ from those of all others.
    Write {
        offset: u64,
        len: u32,
        tag: u32,
    },
    Flush,
}

/// Whose bytes a read gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// At least some are the image's.
    Image,
    /// All were written before by the VM itself.
    Overlay,
}

/// What a word of a read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Probe {
    /// Offset of the word on the disk, in bytes.
    pub(super) offset: u64,
    /// The tag of the write that it comes from; the image's, if none.
    pub(super) tag: Option<u32>,
}

impl Trace {
    /// The recorded boot of Debian 12.
    pub(super) fn debian() -> Outcome<Trace> {
        parse("debian12", DEBIAN, DEBIAN_DISK_BYTES)
    }

    /// A boot in the shape of Windows': 70,000 reads one after the other, 560 MB in all. Made from `seed`.
    ///
    /// Short runs of 4 and 8 KiB at places that lie in 80 zones of 8 MiB, as files do, and one read in ten as
    /// long as a read-ahead.
    pub(super) fn windows(seed: u64) -> Trace {
        const READS: usize = 70_000;
        const DISK_BYTES: u64 = 32 << 30;
        const ZONES: u64 = 80;
        const ZONE_BYTES: u64 = 8 << 20;
        const PAGE: u64 = 4096;
        const RUN_READS_MEAN: f64 = 8.0;
        const GAP_US_MAX: u64 = 1000;
        let mut random = SmallRng::seed_from_u64(seed);
        let zones: Vec<u64> =
            (0..ZONES).map(|_| random.random_range(0..DISK_BYTES / ZONE_BYTES) * ZONE_BYTES).collect();
        let mut builder = Builder::default();
        let (mut zone, mut at) = (zones[0], 0);
        for _ in 0..READS {
            let len = match random.random_range(0..30) {
                0..3 => 8 * PAGE,
                3..12 => 2 * PAGE,
                _ => PAGE,
            };
            let jumps = random.random_bool(1.0 / RUN_READS_MEAN);
            if jumps || at + len > ZONE_BYTES {
                zone = zones[random.random_range(0..zones.len())];
                at = random.random_range(0..(ZONE_BYTES - 8 * PAGE) / PAGE) * PAGE;
            }
            builder.read(random.random_range(0..GAP_US_MAX), zone + at, len as u32);
            at += len;
        }
        Trace { name: "windows", disk_bytes: DISK_BYTES, steps: builder.steps }
    }

    /// Only what comes before the read behind the first `reads`.
    pub(super) fn cut(mut self, reads: usize) -> Trace {
        let is_read = |step: &Step| matches!(step.action, Action::Read { .. });
        let mut seen = 0;
        let end = self.steps.iter().position(|step| {
            seen += usize::from(is_read(step));
            seen > reads
        });
        self.steps.truncate(end.unwrap_or(self.steps.len()));
        self
    }

    /// The chunks that are read, in the order of the first touch, as indices.
    pub(super) fn chunks_in_order(&self) -> Vec<u64> {
        let mut seen = BTreeSet::new();
        let mut order = Vec::new();
        for step in &self.steps {
            let Action::Read { offset, len, .. } = step.action else { continue };
            for chunk in offset / CHUNK..(offset + u64::from(len)).div_ceil(CHUNK) {
                if seen.insert(chunk) {
                    order.push(chunk);
                }
            }
        }
        order
    }

    pub(super) fn reads(&self) -> usize {
        self.steps.iter().filter(|step| matches!(step.action, Action::Read { .. })).count()
    }
}

/// Collects steps, and knows who wrote what.
#[derive(Default)]
struct Builder {
    steps: Vec<Step>,
    /// The last write to each sector.
    written: HashMap<u64, u32>,
    writes: u32,
}

impl Builder {
    fn read(&mut self, gap_us: u64, offset: u64, len: u32) {
        let end = offset + u64::from(len);
        let between = offset + u64::from(len) / 2 / WORD_BYTES * WORD_BYTES;
        let probes = [offset, between, end - WORD_BYTES]
            .map(|offset| Probe { offset, tag: self.written.get(&(offset / SECTOR)).copied() });
        let all_written = (offset / SECTOR..end / SECTOR).all(|sector| self.written.contains_key(&sector));
        let from = if all_written { From::Overlay } else { From::Image };
        self.steps.push(Step { gap_us, action: Action::Read { offset, len, probes, from } });
    }

    fn write(&mut self, gap_us: u64, offset: u64, len: u32) {
        let tag = self.writes;
        self.writes += 1;
        let sectors = offset / SECTOR..(offset + u64::from(len)) / SECTOR;
        self.written.extend(sectors.map(|sector| (sector, tag)));
        self.steps.push(Step { gap_us, action: Action::Write { offset, len, tag } });
    }
}

/// Parses lines of `microseconds,R|W|F,offset,length`; `#` begins a comment.
fn parse(name: &'static str, text: &str, disk_bytes: u64) -> Outcome<Trace> {
    let mut builder = Builder::default();
    let mut before = 0;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
        let wrong = || format!("line {} of the trace {name} is none: '{line}'", number + 1);
        let fields: Vec<&str> = line.split(',').collect();
        let [at, action, offset, len] = fields[..] else { return Err(wrong()) };
        let at: u64 = at.parse().map_err(|_| wrong())?;
        let offset: u64 = offset.parse().map_err(|_| wrong())?;
        let len: u32 = len.parse().map_err(|_| wrong())?;
        let fits = offset.checked_add(len.into()).is_some_and(|end| end <= disk_bytes);
        if !fits || !offset.is_multiple_of(SECTOR) || !u64::from(len).is_multiple_of(SECTOR) {
            return Err(wrong());
        }
        // A request may stand before one that was noted earlier: there are two in the recording.
        let gap_us = at.saturating_sub(before);
        before = before.max(at);
        match action {
            "R" if len > 0 => builder.read(gap_us, offset, len),
            "W" if len > 0 => builder.write(gap_us, offset, len),
            "F" => builder.steps.push(Step { gap_us, action: Action::Flush }),
            _ => return Err(wrong()),
        }
    }
    Ok(Trace { name, disk_bytes, steps: builder.steps })
}

/// A trace for tests of other modules.
#[cfg(test)]
pub(super) fn tests_parse(text: &str, disk_bytes: u64) -> Trace {
    parse("test", text, disk_bytes).expect("a trace of the tests")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recorded_boot_has_its_known_size() {
        let trace = Trace::debian().unwrap();
        assert_eq!(trace.reads(), 2282);
        assert_eq!(trace.steps.len(), 2282 + 313 + 78);
        assert_eq!(trace.chunks_in_order().len(), 1680);
    }

    #[test]
    fn the_synthetic_boot_has_the_shape_that_it_claims() {
        let trace = Trace::windows(1);
        let lens = trace.steps.iter().map(|step| match step.action {
            Action::Read { len, .. } => u64::from(len),
            _ => 0,
        });
        assert_eq!(trace.reads(), 70_000);
        let total = lens.sum::<u64>();
        assert!((540_000_000..600_000_000).contains(&total), "{total} bytes");
        assert_eq!(
            trace.steps[99].action,
            Trace::windows(1).steps[99].action,
            "equal seeds give equal boots"
        );
        assert_ne!(trace.steps[99].action, Trace::windows(2).steps[99].action);
    }

    #[test]
    fn a_read_expects_the_last_write_before_it() {
        let text = "0,W,512,512\n5,R,0,1536\n6,R,512,512\n9,W,0,4096\n12,R,0,1536\n12,F,0,0";
        let trace = parse("test", text, 4096).unwrap();
        let probes = |step: usize| match &trace.steps[step].action {
            Action::Read { probes, from, .. } => (probes.map(|probe| probe.tag), *from),
            other => panic!("{other:?} is not a read"),
        };
        assert_eq!(probes(1), ([None, Some(0), None], From::Image));
        assert_eq!(probes(2), ([Some(0); 3], From::Overlay));
        assert_eq!(probes(4), ([Some(1); 3], From::Overlay));
        assert_eq!(trace.steps.iter().map(|s| s.gap_us).collect::<Vec<_>>(), [0, 5, 1, 3, 3, 0]);
        assert_eq!(trace.cut(1).steps.len(), 2);
    }

    #[test]
    fn a_line_beyond_the_disk_or_of_another_kind_is_refused() {
        for line in
            ["0,R,4096,512", "0,X,0,512", "0,R,0,100", "0,R,0", "x,R,0,512", "0,R,18446744073709551104,512"]
        {
            assert!(parse("test", line, 4096).unwrap_err().contains("line 1"), "{line}");
        }
    }
}
