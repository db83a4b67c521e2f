//! Live migration: for how long a guest stands still, by what the nodes say and by its own console.
//!
//! The counting guest prints a line a round, and Debian has a program that prints one every few hundredths of a second
//! beside one that writes. A gap in these lines is what the guest's user sees; the longest gap of as many seconds
//! without a move stands beside it, since guests run without KVM on few cores.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::Outcome;
use super::super::process::wait_for;
use super::Life;
use super::figures::{Figures, Sheet};
use super::guests::Guest;
use super::site::Site;

/// How often a VM moves.
const MOVES: usize = 10;

/// From the end of a move to the next: time in which the guest's longest gap without a move is seen.
const REST: Duration = Duration::from_secs(2);

/// How often consoles are looked at. A gap is known to this.
const LOOK_EVERY: Duration = Duration::from_micros(500);

/// How long a guest's agent may take to come up after the login prompt, and the guest to print.
const GUEST_TIME_MAX: Duration = Duration::from_secs(240);

const MIB: f64 = (1 << 20) as f64;

/// In Debian: beats on the console, and files of noise that are each synced.
const BEAT: &str = "while :; do echo beat >/dev/ttyS0; sleep 0.05; done";
const WRITER: &str = "mkdir -p /root/noise; n=0; while :; do n=$((n + 1)); head -c 200000 /dev/urandom >/root/noise/$((n % 100)); sync; done";

#[derive(Default)]
struct Moved {
    pause_ms: Vec<f64>,
    gap_ms: Vec<f64>,
    calm_gap_ms: Vec<f64>,
    total_ms: Vec<f64>,
    memory_mib: Vec<f64>,
    disk_mib: Vec<f64>,
    links_mib: Vec<f64>,
}

pub(super) fn run(life: &Life) -> Outcome<Sheet> {
    let begun = Instant::now();
    let mut rows = vec![("counting guest".to_owned(), measure(life, &Guest::counting(life)?, |_| Ok(()))?)];
    if let Some(debian) = &life.debian {
        rows.push(("Debian, writing".to_owned(), measure(life, debian, start_writing)?));
    }
    Ok(Sheet {
        title: "Live migration".to_owned(),
        notes: vec![
            format!("{MOVES} moves each, to and fro; p50 / max"),
            "memory and disk are what was sent of them until the guest went on at its new node; links, what that has fetched of the disk besides by its first line there".to_owned(),
        ],
        columns: vec![
            "pause that is reported, ms",
            "longest gap on the console, ms",
            "the same without a move, ms",
            "whole move, ms",
            "memory, MiB",
            "disk meanwhile, MiB",
            "links, MiB",
        ],
        rows,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

fn measure(
    life: &Life,
    guest: &Guest,
    begin: impl FnOnce(&Site<'_>) -> Outcome,
) -> Outcome<Vec<Option<Figures>>> {
    life.note(&format!("moves: {}", guest.image));
    let site = Site::start(&life.virtman, life.dir.path(), &["o", "a", "b"])?;
    site.share(&["o", "a", "b"], guest.image, &guest.file)?;
    guest.boot(&site, "v", "a", 1)?;
    begin(&site)?;
    let console = Console::watch(["a", "b"].map(|node| site.vm_dir(node, "v-1").join("console.log")));
    let mut moved = Moved::default();
    for number in 0..MOVES {
        let (from, to) = if number % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let calm = Instant::now();
        thread::sleep(REST);
        let sent = site.sent_bytes(from)?;
        let asked = Instant::now();
        let report = site.json(&["migrate", "v-1", "--to", to])?;
        let answered = Instant::now();
        // The gap may last beyond the answer.
        wait_for("the guest's next line", GUEST_TIME_MAX, || (console.last()? > answered).then_some(()))?;
        moved.add(&report)?;
        moved.gap_ms.push(console.longest_gap_ms(asked, answered));
        moved.calm_gap_ms.push(console.longest_gap_ms(calm, asked));
        moved.links_mib.push((site.sent_bytes(from)? - sent) as f64 / MIB);
    }
    let Moved { pause_ms, gap_ms, calm_gap_ms, total_ms, memory_mib, disk_mib, links_mib } = moved;
    let cells = [pause_ms, gap_ms, calm_gap_ms, total_ms, memory_mib, disk_mib, links_mib];
    Ok(cells.map(Figures::of).into())
}

impl Moved {
    fn add(&mut self, report: &Value) -> Outcome {
        let number = |name: &str| report[name].as_f64().ok_or_else(|| format!("'migrate' says no {name}"));
        self.pause_ms.push(number("pause_ms")?);
        self.total_ms.push(number("total_ms")?);
        self.memory_mib.push(number("memory_bytes")? / MIB);
        self.disk_mib.push(number("disk_bytes")? / MIB);
        Ok(())
    }
}

/// Notes when a guest's console grew, wherever the guest is, until it is dropped.
struct Console {
    grown: Arc<std::sync::Mutex<Vec<Instant>>>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Console {
    fn watch(files: [PathBuf; 2]) -> Console {
        let (grown, stop) =
            (Arc::<std::sync::Mutex<Vec<Instant>>>::default(), Arc::new(AtomicBool::new(false)));
        let thread = thread::spawn({
            let (grown, stop) = (Arc::clone(&grown), Arc::clone(&stop));
            move || {
                let mut lens = [0; 2];
                while !stop.load(Ordering::Relaxed) {
                    for (file, len) in files.iter().zip(&mut lens) {
                        // The file is new each time the guest comes to its node.
                        let now = file.metadata().map_or(0, |metadata| metadata.len());
                        if now > *len {
                            lock(&grown).push(Instant::now());
                        }
                        *len = now;
                    }
                    thread::sleep(LOOK_EVERY);
                }
            }
        });
        Console { grown, stop, thread: Some(thread) }
    }

    fn last(&self) -> Option<Instant> {
        lock(&self.grown).last().copied()
    }

    /// The longest time without a line of which some lies between these two.
    fn longest_gap_ms(&self, from: Instant, to: Instant) -> f64 {
        let grown = lock(&self.grown);
        let gaps = grown.windows(2).filter(|gap| gap[0] <= to && gap[1] >= from);
        gaps.map(|gap| (gap[1] - gap[0]).as_secs_f64() * 1e3).fold(0.0, f64::max)
    }
}

fn lock(grown: &std::sync::Mutex<Vec<Instant>>) -> std::sync::MutexGuard<'_, Vec<Instant>> {
    grown.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Drop for Console {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It ends within a look.
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Has Debian beat and write, by its guest agent.
fn start_writing(site: &Site<'_>) -> Outcome {
    let path = site.vm_dir("a", "v-1").join("agent.sock");
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut agent = UnixStream::connect(&path).map_err(failed)?;
    agent.set_read_timeout(Some(Duration::from_secs(2))).map_err(failed)?;
    let mut id = 0;
    // The agent forgets what it is told before it has opened its side, so it is asked until it answers.
    wait_for("the guest's agent", GUEST_TIME_MAX, || {
        id += 1;
        ask(&mut agent, &json!({ "execute": "guest-sync", "arguments": { "id": id } }), &format!("{id}}}"))
    })?;
    for script in [BEAT, WRITER] {
        let arguments = json!({ "path": "/bin/sh", "arg": ["-c", script] });
        ask(&mut agent, &json!({ "execute": "guest-exec", "arguments": arguments }), "\"pid\"")
            .ok_or("the guest's agent starts nothing")?;
    }
    Ok(())
}

/// Sends a command and waits until an answer has `wanted` in it; [`None`] if that takes longer than a read may.
fn ask(agent: &mut UnixStream, command: &Value, wanted: &str) -> Option<()> {
    agent.write_all(format!("{command}\n").as_bytes()).ok()?;
    let mut said = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let len = agent.read(&mut piece).ok().filter(|len| *len > 0)?;
        said.extend_from_slice(&piece[..len]);
        if String::from_utf8_lossy(&said).contains(wanted) {
            return Some(());
        }
    }
}
