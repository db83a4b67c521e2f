//! Many clones of one running VM on several nodes, against booting as many VMs from its image.
//!
//! Clones come first, when only the running VM's node has what a boot reads; the VMs that are booted from the image
//! find it everywhere. Guests run without KVM on few cores, so that most of what is measured is theirs: the counting
//! guest, and disks without guests, show the product's own part.

use std::time::Instant;

use serde_json::Value;

use super::super::Outcome;
use super::Life;
use super::figures::{Figures, Sheet};
use super::guests::Guest;
use super::site::Site;

const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];

pub(super) fn run(life: &Life, count: usize) -> Outcome<Sheet> {
    let begun = Instant::now();
    let mut rows = Vec::new();
    let mut guests = vec![("counting guest", Guest::counting(life)?)];
    if let Some(debian) = &life.debian {
        guests.push(("Debian", debian.clone()));
    }
    for (name, guest) in guests {
        // Debian takes minutes, and one time tells enough.
        let rounds = if guest.image == "debian:12" { 1 } else { life.rounds };
        rows.extend(measure(life, name, &guest, count, rounds)?);
    }
    Ok(Sheet {
        title: format!("{count} clones of a running VM on {} nodes, s", NODES.len()),
        notes: vec!["p50 / max; command: from its start until the last VM is there; guest: from its own start until it is ready".to_owned()],
        columns: vec!["command", "guest"],
        rows,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// What one way to VMs gave, in seconds.
#[derive(Default)]
struct Way {
    commands: Vec<f64>,
    guests: Vec<f64>,
}

impl Way {
    /// Runs a command that gives VMs.
    fn take(&mut self, command: impl FnOnce() -> Outcome<Value>) -> Outcome {
        let begun = Instant::now();
        let report = command()?;
        self.commands.push(begun.elapsed().as_secs_f64());
        let vms = report["vms"].as_array().into_iter().flatten();
        self.guests.extend(vms.filter_map(|vm| vm["ready_ms"].as_f64()).map(|ms| ms / 1e3));
        Ok(())
    }

    fn row(self, what: String) -> (String, Vec<Option<Figures>>) {
        (what, vec![Figures::of(self.commands), Figures::of(self.guests)])
    }
}

fn measure(
    life: &Life,
    name: &str,
    guest: &Guest,
    count: usize,
    rounds: u32,
) -> Outcome<Vec<(String, Vec<Option<Figures>>)>> {
    let nodes = NODES.join(",");
    let number = count.to_string();
    let [mut alone, mut disks, mut clones, mut boots] = [(); 4].map(|()| Way::default());
    for round in 0..rounds {
        life.note(&format!("crowd: {name}, round {} of {rounds}", round + 1));
        let site = Site::start(&life.virtman, life.dir.path(), &NODES)?;
        site.share(&NODES, guest.image, &guest.file)?;
        alone.take(|| guest.boot(&site, "one", "n1", 1))?;
        let clone = ["clone", "one-1", "--to", &nodes, "--count", &number];
        disks.take(|| site.json(&[&clone[..], &["--name", "d"]].concat()))?;
        destroy(&site, "d", count)?;
        let start = ["--name", "c", "--start", "--ready", guest.ready, "--timeout", super::BOOT_TIME_MAX];
        clones.take(|| site.json(&[&clone[..], &start].concat()))?;
        destroy(&site, "c", count)?;
        boots.take(|| guest.boot(&site, "b", &nodes, count))?;
    }
    Ok(vec![
        alone.row(format!("{name}: one, booted from the image")),
        disks.row(format!("{name}: {count} clones' disks")),
        clones.row(format!("{name}: {count} clones, started")),
        boots.row(format!("{name}: {count} booted from the image")),
    ])
}

fn destroy(site: &Site<'_>, prefix: &str, count: usize) -> Outcome {
    let names: Vec<String> = (1..=count).map(|number| format!("{prefix}-{number}")).collect();
    let args: Vec<&str> = std::iter::once("destroy").chain(names.iter().map(String::as_str)).collect();
    site.run(&args).map(drop)
}
