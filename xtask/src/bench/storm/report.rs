//! What a storm prints and writes: one line a run, and what is wrong below.

use std::fs::File;
use std::io::Write;

use serde::Serialize;

use super::super::Outcome;
use super::attach::Attach;
use super::figures::{Percentiles, Run, Uplink};
use super::plan::{Boot, StormArgs};
use super::trace::Trace;

/// All of it, as it goes into the JSON file.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The command that repeats it.
    command: String,
    guest: &'static str,
    reads_per_vm: usize,
    think: f64,
    rate_mbit: f64,
    /// Bytes of the chunks that a boot reads: W.
    boot_bytes: u64,
    /// The least time in which one link carries them: W/B.
    bound_seconds: f64,
    /// How TCP paces itself here.
    congestion_control: String,
    seed: u64,
    pub(super) runs: Vec<Run>,
    pub(super) attach: Option<Attach>,
}

impl Report {
    pub(super) fn new(args: &StormArgs, trace: &Trace, boot: &Boot) -> Report {
        let plan = args.plan(args.shapes[0]);
        let congestion = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
        Report {
            command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
            guest: trace.name,
            reads_per_vm: trace.reads(),
            think: args.think,
            rate_mbit: plan.rate.mbit,
            boot_bytes: boot.bytes(),
            bound_seconds: plan.bound_seconds(boot),
            congestion_control: congestion.unwrap_or_default().trim().to_owned(),
            seed: args.seed,
            runs: Vec::new(),
            attach: None,
        }
    }

    /// For people.
    pub(super) fn print(&self) {
        println!("cargo xtask {}", self.command);
        println!(
            "boot of {}: {} reads a VM, {:.1} MB of chunks; links of {} Mbit/s carry these in {:.2} s; think x{}; {}",
            self.guest,
            self.reads_per_vm,
            self.boot_bytes as f64 / 1e6,
            self.rate_mbit,
            self.bound_seconds,
            self.think,
            self.congestion_control,
        );
        println!();
        println!(
            "{:<24} {:>9} {:>6} {:>22} {:>17} {:>11} {:>6} {:>20} {:>9} {:>16} {:>6} {:>6}",
            "run",
            "makespan",
            "C",
            "VM done, s, p50/99/max",
            "E p50/p99/max",
            "G wire/sent",
            "fetch",
            "stall, s, p50/99/max",
            "longest",
            "read, ms, p50/99",
            "errors",
            "CPU, s"
        );
        for run in &self.runs {
            print_run(run);
        }
        for run in &self.runs {
            print_notes(run);
        }
        if let Some(attach) = &self.attach {
            attach.print();
        }
    }

    pub(super) fn write_json(&self, mut file: File) -> Outcome {
        let failed = |e: &dyn std::fmt::Display| format!("cannot write the figures: {e}");
        serde_json::to_writer_pretty(&mut file, self).map_err(|e| failed(&e))?;
        file.write_all(b"\n").map_err(|e| failed(&e))
    }

    /// Wrong bytes and failed reads are no figures: they fail the command.
    pub(super) fn verdict(&self) -> Outcome {
        let (errors, wrong) =
            self.runs.iter().fold((0, 0), |(e, w), run| (e + run.errors, w + run.wrong_reads));
        if errors + wrong == 0 {
            Ok(())
        } else {
            Err(format!("{errors} requests failed and {wrong} reads gave wrong bytes"))
        }
    }
}

fn three(percentiles: Option<Percentiles>, digits: usize) -> String {
    percentiles
        .map_or("-".to_owned(), |p| format!("{:.digits$}/{:.digits$}/{:.digits$}", p.p50, p.p99, p.max))
}

fn one(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

fn print_run(run: &Run) {
    let makespan = match run.part_done {
        Some(_) => format!("> {:.0} s", run.makespan_seconds),
        None => format!("{:.2} s", run.makespan_seconds),
    };
    println!(
        "{:<24} {:>9} {:>6} {:>22} {:>17} {:>11} {:>6} {:>20} {:>9} {:>16} {:>6} {:>6}",
        run.name,
        makespan,
        one(run.cold_to_warm, 3),
        three(run.finished_seconds, 1),
        three(run.boot_set_ratio, 2),
        format!("{:.2}/{}", run.origin_wire_ratio, one(run.origin_sent_ratio, 2)),
        one(run.fetches_per_chunk, 3),
        three(run.stalled_seconds, 2),
        format!("{:.0} ms", run.longest_read_ms),
        format!("{:.2}/{:.1}", run.read_ms.p50, run.read_ms.p99),
        run.errors + run.wrong_reads,
        one(run.cpu_seconds, 1),
    );
}

fn print_notes(run: &Run) {
    let note = |text: String| println!("{}: {text}", run.name);
    if let Some(part) = run.part_done {
        let whole = run.makespan_seconds / part.max(f64::MIN_POSITIVE);
        note(format!(
            "{} of {} VMs had not finished at the limit; {:.1} % of all reads were done; at that pace, as an extrapolation, all would take {whole:.0} s",
            run.vms_unfinished,
            run.vms,
            part * 100.0
        ));
    }
    let moved = |uplink: &Uplink| uplink.up + uplink.down > 0.01;
    for (rack, uplink) in run.uplinks.iter().enumerate().filter(|(_, uplink)| moved(uplink)) {
        note(format!("uplink of rack {rack}: {:.2} W up, {:.2} W down", uplink.up, uplink.down));
    }
    if let Some(churn) = &run.churn {
        for event in &churn.events {
            note(format!("{:>6.2} s  {}", event.seconds, event.what));
        }
        note(format!("{} VMs were given up with their nodes", run.vms_given_up));
        note(format!(
            "longest read after the death of a parent, p50/p99/max of {} VMs: {} ms; deaths while the origin was away, left out: {}",
            churn.parent_death_vms,
            three(churn.parent_death_stall_ms, 0),
            churn.parent_deaths_left_out
        ));
    }
    run.complaints.iter().for_each(|complaint| note(complaint.clone()));
}
