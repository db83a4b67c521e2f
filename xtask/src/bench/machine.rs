//! What the figures were taken on.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// The machine and the foreign programs.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    processor: String,
    cores: usize,
    memory_gib: u64,
    kernel: String,
    file_system: String,
    tools: Vec<String>,
    /// Processes that ran or wanted to, as a mean over a minute.
    load_before: f64,
    pub(super) load_after: f64,
}

/// Describes this machine; files of the benchmarks lie in `dir`.
pub(super) fn describe(dir: &Path) -> Machine {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let memory_kib = field(&meminfo, "MemTotal")
        .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or_default();
    let tools = ["qemu-storage-daemon", "fio", "b3sum"];
    Machine {
        processor: field(&cpuinfo, "model name").unwrap_or_else(|| "unknown".to_owned()),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_gib: memory_kib.div_ceil(1 << 20),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        file_system: first_line(Command::new("findmnt").args(["-n", "-o", "FSTYPE", "-T"]).arg(dir)),
        tools: tools.map(|tool| first_line(Command::new(tool).arg("--version"))).to_vec(),
        load_before: load(),
        load_after: 0.0,
    }
}

/// The mean number of processes that ran or wanted to over the last minute.
pub(super) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or_default()
}

fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}

impl Machine {
    /// For people.
    pub(super) fn print(&self) {
        println!(
            "{} cores ({}), {} GiB, Linux {}, files on {}; load {:.1} before, {:.1} after",
            self.cores,
            self.processor,
            self.memory_gib,
            self.kernel,
            self.file_system,
            self.load_before,
            self.load_after
        );
        println!("{}", self.tools.join("; "));
    }
}
