//! The hierarchy planner: how fast it takes nodes in, and how deep the trees get.
//!
//! One thread, no network: events go into the planner and placements come out. Measured is processor time,
//! so that what else the machine does weighs less. Relays come to the racks in turn, below one origin without
//! a location; then every tenth dies, one event each; then Volt restarts and all report where they hang.

use std::collections::BTreeMap;
use std::fmt;

use block::{ImageId, NodeName};
use clap::Args;
use planner::{Action, Event, Millis, Placement, Planner, Role, Settings, Shape};
use serde::Serialize;

use super::Outcome;
use super::process::cpu_seconds;

/// The shapes that are measured, as fan-out and stripes.
const SHAPES: [(u32, u32); 4] = [(2, 1), (2, 2), (4, 4), (8, 8)];

/// Any lease: only what follows from it is measured.
const LEASE: Millis = Millis(10_000);

/// Ticks until the deaths' last moves are over.
const TICKS: usize = 10;

/// Measure the hierarchy planner: joins, deaths and a restart of Volt
#[derive(Debug, Args)]
pub(super) struct VoltArgs {
    /// How many relays join
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    relays: u32,
    /// How many racks they stand in, beside a run without any location
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    racks: u32,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// One shape, with or without racks. Times are of one processor.
#[derive(Debug, Serialize)]
struct Row {
    fan_out: u32,
    stripes: u32,
    /// None if no node says where it stands.
    racks: Option<u32>,
    relays: u32,
    join_seconds: f64,
    joins_per_second: f64,
    joins_told: usize,
    /// Steps to the origin, at most.
    depth: u32,
    deaths: u32,
    death_seconds: f64,
    deaths_told: usize,
    /// A few ticks after the deaths.
    depth_after_deaths: u32,
    reports: u32,
    restart_seconds: f64,
    restart_told: usize,
}

const HEADS: &str = "fan-out stripes racks   joins s  joins/s  told each  depth   deaths s  told each  depth   restart s  told";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = |told: usize, of: u32| told as f64 / f64::from(of.max(1));
        write!(
            f,
            "{:>7} {:>7} {:>5}   {:>7.2} {:>8.0} {:>10.1} {:>6}   {:>8.2} {:>10.1} {:>6}   {:>9.2} {:>5}",
            self.fan_out,
            self.stripes,
            self.racks.map_or("-".to_owned(), |racks| racks.to_string()),
            self.join_seconds,
            self.joins_per_second,
            each(self.joins_told, self.relays),
            self.depth,
            self.death_seconds,
            each(self.deaths_told, self.deaths),
            self.depth_after_deaths,
            self.restart_seconds,
            self.restart_told
        )
    }
}

pub(super) fn run(args: &VoltArgs) -> Outcome {
    if !args.json {
        println!("{HEADS}");
    }
    let mut rows = Vec::new();
    for (fan_out, stripes) in SHAPES {
        let shape = Shape::new(fan_out, stripes).map_err(|e| e.to_string())?;
        for racks in [None, Some(args.racks)] {
            let row = measure(shape, args.relays, racks)?;
            if args.json {
                eprintln!("{row}");
            } else {
                println!("{row}");
            }
            rows.push(row);
        }
    }
    if args.json {
        let text = serde_json::to_string_pretty(&rows).map_err(|e| format!("cannot print the rows: {e}"))?;
        println!("{text}");
    }
    Ok(())
}

fn measure(shape: Shape, relays: u32, racks: Option<u32>) -> Outcome<Row> {
    let mut cluster = Cluster::new(shape, racks);
    cluster.join(0, Role::Origin, None)?;
    let mut before = cpu_seconds("self")?;
    let mut lap = || {
        let now = cpu_seconds("self")?;
        let seconds = now - before;
        before = now;
        Outcome::Ok(seconds)
    };
    lap()?;
    let mut joins_told = 0;
    for number in 1..=relays {
        joins_told += cluster.join(number, Role::Relay, None)?;
    }
    let join_seconds = lap()?;
    let depth = cluster.depth();

    lap()?;
    let dead: Vec<u32> = (1..=relays).step_by(10).collect();
    let mut deaths_told = 0;
    for &number in &dead {
        deaths_told += cluster.apply(Event::NodeDown { node: node(number)? });
    }
    let death_seconds = lap()?;
    for _ in 0..TICKS {
        cluster.apply(Event::Tick);
    }
    let depth_after_deaths = cluster.depth();

    let placements = std::mem::take(&mut cluster.told);
    let mut fresh = Cluster { planner: planner(shape), now: Millis(0), told: BTreeMap::new(), racks };
    lap()?;
    fresh.join(0, Role::Origin, None)?;
    let mut restart_told = 0;
    for number in (1..=relays).filter(|number| number % 10 != 1) {
        let current = placements.get(&node(number)?).cloned();
        restart_told += fresh.join(number, Role::Relay, current)?;
    }
    let restart_seconds = lap()?;
    Ok(Row {
        fan_out: shape.fan_out(),
        stripes: shape.stripes(),
        racks,
        relays,
        join_seconds,
        joins_per_second: f64::from(relays) / join_seconds.max(f64::EPSILON),
        joins_told,
        depth,
        deaths: u32::try_from(dead.len()).unwrap_or(u32::MAX),
        death_seconds,
        deaths_told,
        depth_after_deaths,
        reports: relays - relays.div_ceil(10),
        restart_seconds,
        restart_told,
    })
}

/// A planner, and what the nodes know from it.
struct Cluster {
    planner: Planner,
    now: Millis,
    told: BTreeMap<NodeName, Placement>,
    racks: Option<u32>,
}

fn planner(shape: Shape) -> Planner {
    Planner::new(Settings { lease: LEASE, shaping: shape.into() })
}

fn node(number: u32) -> Outcome<NodeName> {
    format!("n{number:05}").parse().map_err(|e| format!("a node's name is refused: {e}"))
}

impl Cluster {
    /// One that no longer waits for reports.
    fn new(shape: Shape, racks: Option<u32>) -> Cluster {
        let mut cluster = Cluster { planner: planner(shape), now: Millis(0), told: BTreeMap::new(), racks };
        cluster.apply(Event::Tick);
        cluster.now = LEASE;
        cluster.apply(Event::Tick);
        cluster
    }

    /// Lets a node register and attach; how many placements were told.
    fn join(&mut self, number: u32, role: Role, current: Option<Placement>) -> Outcome<usize> {
        let name = node(number)?;
        let location = match self.racks.filter(|_| role == Role::Relay) {
            Some(racks) => format!("z/r{}", number % racks),
            None => String::new(),
        };
        let location = location.parse().map_err(|e| format!("a location is refused: {e}"))?;
        let address = format!("{name}:7000");
        self.told.extend(current.clone().map(|current| (name.clone(), current)));
        let up = self.apply(Event::NodeUp { node: name.clone(), address, location });
        let image = ImageId::from_bytes([1; 32]);
        Ok(up + self.apply(Event::Attach { node: name, image, role, current }))
    }

    fn apply(&mut self, event: Event) -> usize {
        let mut told = 0;
        for action in self.planner.apply(self.now, event) {
            if let Action::Place { node, placement, .. } = action {
                self.told.insert(node, placement);
                told += 1;
            }
        }
        told
    }

    fn depth(&self) -> u32 {
        let trees = self.planner.images().filter_map(|image| self.planner.tree(&image));
        trees.flat_map(|tree| tree.stripes).flatten().map(|node| node.depth).max().unwrap_or_default()
    }
}
