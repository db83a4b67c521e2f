//! When a chunk travels compressed, and how.
//!
//! A chunk that came compressed goes on as it came, whatever the link: that costs nothing. Another is
//! compressed if that makes it arrive earlier: if the time that the saved bytes take on the link, at the rate
//! measured while the link was the bottleneck, exceeds what compressing and unpacking cost. A link that
//! never backs up has no measured rate and is sent raw bytes.
//!
//! zstd level 1: higher levels shrink disk images by a few percent more at half the speed.

use std::cell::RefCell;
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use bytes::Bytes;

/// Compression level.
const LEVEL: i32 = 1;

/// A chunk that shrinks to more than this part of itself is sent raw: unpacking would cost more than it saves.
const RATIO_MAX: f64 = 0.9;

/// What zstd level 1 compresses on one core, in bytes per second, measured on disk images. A conservative
/// constant rather than a measurement, so that the same link decides the same on a busy machine.
const PACK_RATE: f64 = 400e6;

/// What zstd unpacks on one core, in bytes per second.
const UNPACK_RATE: f64 = 1000e6;

/// Bytes over which a rate is measured: more than socket buffers begin with, so that the first bytes, which
/// only fill them, do not count as a fast link for long.
const RATE_SAMPLE_BYTES: u64 = 1 << 20;

/// What a disk image usually shrinks to: assumed until the link's own chunks tell.
const RATIO_GUESS: f64 = 0.5;

/// While chunks do not shrink enough, one in so many is tried, to notice when they do: what that costs is lost
/// in the noise.
const PROBE_EVERY: u32 = 64;

/// Weight of the newest chunk in the running ratio: about the last ten chunks count.
const RATIO_WEIGHT: f64 = 0.1;

/// Whether compressing by `ratio` (packed / raw) makes a chunk arrive earlier on a link of `rate` bytes per
/// second.
pub fn packing_gains(rate: f64, ratio: f64) -> bool {
    ratio <= RATIO_MAX && (1.0 - ratio) / rate > 1.0 / PACK_RATE + 1.0 / UNPACK_RATE
}

/// What to do with a chunk that is not compressed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Send it raw.
    Leave,
    /// Compress it, and send what comes out if it is enough smaller.
    Try,
}

/// Decides for one link. Owns no clock: time is handed in.
#[derive(Debug)]
pub struct PackPolicy {
    /// Begin of the running measurement, while the link is backed up, and the bytes written since.
    busy: Option<(Duration, u64)>,
    rate: Option<f64>,
    ratio: f64,
    left_raw: u32,
}

impl Default for PackPolicy {
    fn default() -> PackPolicy {
        PackPolicy { busy: None, rate: None, ratio: RATIO_GUESS, left_raw: 0 }
    }
}

impl PackPolicy {
    /// A write begins; what is not written at once backs up behind it.
    pub fn writing(&mut self, now: Duration) {
        self.busy.get_or_insert((now, 0));
    }

    /// `bytes` were taken by the stream.
    pub fn wrote(&mut self, bytes: usize, now: Duration) {
        let Some((since, sum)) = &mut self.busy else { return };
        *sum += bytes as u64;
        if *sum >= RATE_SAMPLE_BYTES {
            let seconds = now.saturating_sub(*since).as_secs_f64();
            self.rate = Some(*sum as f64 / seconds.max(1e-9));
            self.busy = Some((now, 0));
        }
    }

    /// Nothing is left to write: the link was not the bottleneck, so what was measured says nothing of it.
    pub fn drained(&mut self) {
        self.busy = None;
    }

    /// The link's rate in bytes per second, when it was last backed up.
    pub fn rate(&self) -> Option<f64> {
        self.rate
    }

    /// What to do with the next chunk that is not compressed yet.
    pub fn choose(&mut self) -> Packing {
        let Some(rate) = self.rate else { return Packing::Leave };
        if packing_gains(rate, self.ratio) {
            return Packing::Try;
        }
        self.left_raw += 1;
        if self.left_raw >= PROBE_EVERY && packing_gains(rate, RATIO_GUESS) {
            self.left_raw = 0;
            return Packing::Try;
        }
        Packing::Leave
    }

    /// What [`Packing::Try`] came to: packed bytes per raw byte.
    pub fn tried(&mut self, ratio: f64) {
        self.ratio += (ratio - self.ratio) * RATIO_WEIGHT;
    }
}

thread_local! {
    /// One per thread, because setting one up costs more than compressing a chunk.
    static PACKER: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static UNPACKER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses a chunk's bytes. The ratio comes back either way, the packed form only if it is worth sending.
pub fn pack(bytes: &[u8]) -> (f64, Option<Bytes>) {
    let packed = PACKER.with_borrow_mut(|packer| {
        if packer.is_none() {
            *packer = zstd::bulk::Compressor::new(LEVEL).ok();
        }
        packer.as_mut()?.compress(bytes).ok()
    });
    // Without memory for a context the chunk goes raw.
    let Some(packed) = packed else { return (1.0, None) };
    let ratio = packed.len() as f64 / bytes.len().max(1) as f64;
    // The copy gives back what the compressor reserved for the worst case.
    (ratio, (ratio <= RATIO_MAX).then(|| Bytes::copy_from_slice(&packed)))
}

/// Unpacks foreign bytes to at most [`CHUNK_BYTES`]; `None` if they are no zstd frame or hold more.
pub fn unpack(packed: &[u8]) -> Option<Bytes> {
    let mut out = Vec::with_capacity(CHUNK_BYTES);
    UNPACKER.with_borrow_mut(|unpacker| {
        if unpacker.is_none() {
            *unpacker = zstd::bulk::Decompressor::new().ok();
        }
        // The capacity of `out` is the bound.
        unpacker.as_mut()?.decompress_to_buffer(packed, &mut out).ok()
    })?;
    Some(out.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_gains_on_slow_links_only_and_only_if_it_shrinks() {
        assert!(packing_gains(12e6, 0.5), "100 Mbit/s");
        assert!(packing_gains(118e6, 0.4), "1 Gbit/s");
        assert!(!packing_gains(1.2e9, 0.4), "10 Gbit/s");
        assert!(!packing_gains(12e6, 0.95), "hardly shrinks");
        assert!(!packing_gains(12e6, 1.1), "grows");
        assert!(!packing_gains(f64::INFINITY, 0.1));
    }

    fn slow() -> PackPolicy {
        let mut policy = PackPolicy::default();
        policy.writing(Duration::from_secs(1));
        policy.wrote(RATE_SAMPLE_BYTES as usize, Duration::from_secs(2));
        policy
    }

    #[test]
    fn the_rate_is_measured_only_while_the_link_is_backed_up() {
        let mut policy = PackPolicy::default();
        for second in 0..100 {
            policy.writing(Duration::from_secs(second));
            policy.wrote(CHUNK_BYTES, Duration::from_secs(second + 1));
            policy.drained();
        }
        assert_eq!((policy.rate(), policy.choose()), (None, Packing::Leave));
        assert_eq!(slow().rate(), Some(RATE_SAMPLE_BYTES as f64));
        assert_eq!(slow().choose(), Packing::Try);
    }

    #[test]
    fn chunks_that_do_not_shrink_are_tried_now_and_then_until_they_do() {
        let mut policy = slow();
        (0..100).for_each(|_| policy.tried(1.0));
        let tries = (0..10 * PROBE_EVERY).filter(|_| policy.choose() == Packing::Try).count();
        assert_eq!(tries, 10);
        (0..20).for_each(|_| policy.tried(0.3));
        assert_eq!(policy.choose(), Packing::Try);
    }

    #[test]
    fn a_chunk_survives_packing_and_noise_is_left_raw() {
        let text: Vec<u8> = (0..CHUNK_BYTES).map(|i| (i / 97) as u8).collect();
        let (ratio, packed) = pack(&text);
        assert!(ratio < 0.5);
        assert_eq!(unpack(&packed.unwrap()).unwrap(), text);
        let mut noise = vec![0; CHUNK_BYTES];
        rand::Rng::fill(&mut <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(1), &mut noise[..]);
        assert_eq!(pack(&noise).1, None);
    }

    #[test]
    fn a_bomb_is_not_unpacked_beyond_a_chunk() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        assert!(bomb.len() < CHUNK_BYTES);
        assert_eq!(unpack(&bomb), None);
        let one_more = zstd::bulk::compress(&vec![0; CHUNK_BYTES + 1], 1).unwrap();
        assert_eq!(unpack(&one_more), None);
        assert_eq!(unpack(b"no zstd"), None);
    }
}
