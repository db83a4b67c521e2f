//! Figures: how close the simulated storm comes to the limit of the network.
//!
//! All relays have attached before the clock of a figure starts, so that a figure is about the transfer and not
//! about how fast Volt takes registrations, which is a figure of its own. Then all stream the boot set at once.

use std::fmt;
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use planner::Shaping;
use serde::Serialize;

use crate::client::warm;
use crate::run::{Failure, Outcome, run};
use crate::scenario::{Faults, Scale, Scenario, fixed};
use crate::trace::{Thinking, Trace};

/// Chunks of the boot set of a Debian boot: 110 MB.
pub const BOOT_CHUNKS: u32 = 1_680;

/// Time in which the nodes attach before the storm.
const START_WITHIN: Duration = Duration::from_secs(2);

/// When the storm begins.
const STREAM_AT: Duration = Duration::from_secs(6);

/// One storm's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its nodes, shape and speed.
    pub what: String,
    /// Relays.
    pub nodes: u32,
    /// Chunks of 64 KiB of the boot set.
    pub chunks: u32,
    /// Rate of a link in Gbit/s.
    pub gbits: f64,
    /// Boot set over rate, in seconds.
    pub limit_s: f64,
    /// Time until a node has the boot set over that limit: the median of the nodes.
    pub e_p50: f64,
    /// The same, for 99 of 100 nodes.
    pub e_p99: f64,
    /// The same, for all.
    pub e_max: f64,
    /// Bytes that left the origin over the bytes of the boot set.
    pub g: f64,
    /// The most bytes that left a relay over those of the boot set.
    pub relay_max: f64,
    /// The most bytes through one rack's link in one direction over those of the boot set.
    pub rack_max: Option<f64>,
    /// Chunks sent for each that a node kept.
    pub sent_per_kept: f64,
    /// Steps from the origin to the deepest node.
    pub depth: u32,
    /// Seconds that a guest takes when its node has all chunks.
    pub warm_s: Option<f64>,
    /// Seconds until 99 of 100 guests had read all.
    pub booted_p99_s: Option<f64>,
    /// Seconds until the last guest had.
    pub booted_max_s: Option<f64>,
    /// The longest wait for one read, in seconds, for 99 of 100 guests.
    pub stall_p99_s: Option<f64>,
}

impl Scenario {
    /// A storm without faults on a flat network.
    pub fn storm(nodes: u32, chunks: u32, gbits: f64, shaping: Shaping) -> Scenario {
        Scenario {
            seed: 1,
            nodes,
            chunks,
            gbits,
            racks: 0,
            rack_gbits: gbits,
            shaping,
            guests: 0,
            profile: true,
            faults: Faults::None,
            bug: None,
            scale: Scale::Measured,
            latency: Duration::from_micros(50),
            lease: Duration::from_secs(3),
            volt_delay_max: Duration::from_millis(1),
            volt_cpu: Duration::ZERO,
            stream_at: STREAM_AT,
            start_within: START_WITHIN,
            trace: None,
        }
    }
}

impl Row {
    fn of(what: String, scenario: &Scenario, outcome: &Outcome) -> Row {
        let limit = scenario.wire_limit().as_secs_f64();
        let bytes = f64::from(scenario.chunks) * CHUNK_BYTES as f64;
        let e = |time: Duration| time.as_secs_f64() / limit;
        let guests = |seconds: Duration| (scenario.guests > 0).then_some(seconds.as_secs_f64());
        Row {
            what,
            nodes: scenario.nodes,
            chunks: scenario.chunks,
            gbits: scenario.gbits,
            limit_s: limit,
            e_p50: e(outcome.complete.quantile(0.5)),
            e_p99: e(outcome.complete.quantile(0.99)),
            e_max: e(outcome.complete.max()),
            g: outcome.origin_bytes as f64 / bytes,
            relay_max: outcome.relay_bytes_max as f64 / bytes,
            rack_max: (scenario.racks > 0).then_some(outcome.rack_bytes_max as f64 / bytes),
            sent_per_kept: outcome.sent_per_kept,
            depth: outcome.depth,
            warm_s: scenario.trace.as_deref().map(|reads| warm(reads).as_secs_f64()),
            booted_p99_s: guests(outcome.booted.quantile(0.99)),
            booted_max_s: guests(outcome.booted.max()),
            stall_p99_s: guests(outcome.stalls.quantile(0.99)),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_dash = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        write!(
            f,
            "{:32} {:6} {:5} {:5} {:8.4} {:6.3} {:6.3} {:6.3} {:6.3} {:6.3} {:>6} {:6.3} {:5} {:>7} {:>7} {:>7} {:>7}",
            self.what,
            self.nodes,
            self.chunks,
            self.gbits,
            self.limit_s,
            self.e_p50,
            self.e_p99,
            self.e_max,
            self.g,
            self.relay_max,
            or_dash(self.rack_max),
            self.sent_per_kept,
            self.depth,
            or_dash(self.warm_s),
            or_dash(self.booted_p99_s),
            or_dash(self.booted_max_s),
            or_dash(self.stall_p99_s),
        )
    }
}

/// The heads of the columns of a [`Row`].
pub const HEADS: &str = "what                              nodes chunks Gbit/s  W/B, s  E p50  E p99  E max      G  relay   \
                         rack   sent depth    warm boot p99 boot max stall p99";

fn measure(what: &str, scenario: &Scenario) -> Result<Row, Failure> {
    Ok(Row::of(what.to_owned(), scenario, &run(scenario)?))
}

/// Storms on a flat network: each size with each speed and shape.
#[derive(Debug, Clone)]
pub struct Storms {
    /// Relays.
    pub sizes: Vec<u32>,
    /// Rates of a link in Gbit/s.
    pub speeds: Vec<f64>,
    /// How the hierarchy gets its shape, each with a name.
    pub shapes: Vec<(String, Shaping)>,
    /// Chunks of the boot set. Fewer take less time and fall more unevenly on the stripes.
    pub chunks: u32,
}

/// Measures storms, and hands each row out as it is done.
///
/// # Errors
/// The first promise that a run broke.
pub fn storms(storms: &Storms, mut done: impl FnMut(&Row)) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for &nodes in &storms.sizes {
        for &gbits in &storms.speeds {
            for (name, shaping) in &storms.shapes {
                let row = measure(name, &Scenario::storm(nodes, storms.chunks, gbits, *shaping))?;
                done(&row);
                rows.push(row);
            }
        }
    }
    Ok(rows)
}

/// The experiment of the paper: 100 hosts in 4 racks whose links carry a 25th of what their hosts could send, 10
/// guests on each, 1 Gbit/s. Guests that do not think ask as fast as they are answered; those that do show
/// how much of a boot is waiting.
///
/// # Errors
/// The first promise that a run broke.
pub fn racks(trace: &Trace, mut done: impl FnMut(&Row)) -> Result<Vec<Row>, Failure> {
    let base =
        || Scenario { racks: 4, rack_gbits: 1.0, ..Scenario::storm(100, trace.chunks, 1.0, Shaping::Auto) };
    let booting = |thinking| Scenario { guests: 10, trace: Some(trace.with(thinking)), ..base() };
    let cases = [
        ("racks, profile", base()),
        ("racks, binary, profile", Scenario { shaping: fixed(2, 1), ..base() }),
        ("racks, reads", Scenario { profile: false, ..booting(Thinking::No) }),
        ("racks, reads and profile", booting(Thinking::No)),
        ("racks, boots", Scenario { profile: false, ..booting(Thinking::AsRecorded) }),
        ("racks, boots and profile", booting(Thinking::AsRecorded)),
    ];
    let mut rows = Vec::new();
    for (name, scenario) in cases {
        let row = measure(name, &scenario)?;
        done(&row);
        rows.push(row);
    }
    Ok(rows)
}
