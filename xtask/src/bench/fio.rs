//! Load on an NBD server by `fio`, and what it cost the server.

use std::process::Command;

use serde_json::Value;

use super::Outcome;
use super::process::{Daemon, output};
use super::report::Sample;

/// What the requests do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    /// Writes with a flush after each.
    WriteFlushed,
}

/// Size, order and depth of the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// 4 KiB at random places, so many at a time.
    Random { depth: u32 },
    /// 1 MiB one behind the other, four at a time.
    Sequential,
}

/// How long the load goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// For so many seconds, places again and again.
    Seconds(u32),
    /// Until each place was used once, but for at most so many seconds.
    OnceOrSeconds(u32),
}

/// One kind of load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) access: Access,
    pub(super) shape: Shape,
    pub(super) until: Until,
}

/// An NBD export, and the process that serves it.
pub(super) struct Server<'a> {
    pub(super) daemon: &'a Daemon,
    pub(super) uri: &'a str,
}

impl Load {
    /// The unit of the figures.
    pub(super) fn unit(&self) -> &'static str {
        match self.shape {
            Shape::Random { .. } => "1000/s",
            Shape::Sequential => "MiB/s",
        }
    }

    /// For people.
    pub(super) fn name(&self) -> String {
        let access = match self.access {
            Access::Read => "read",
            Access::Write => "write",
            Access::WriteFlushed => "write and flush",
        };
        match self.shape {
            Shape::Random { depth } => format!("4 KiB random {access}, depth {depth}"),
            Shape::Sequential => format!("1 MiB sequential {access}, depth 4"),
        }
    }

    /// Puts the load on a server. The cost is the server's processor time in microseconds per request of
    /// 4 KiB, or in milliseconds per GiB of sequential access.
    pub(super) fn run(&self, server: &Server<'_>) -> Outcome<Sample> {
        let before = server.daemon.cpu_seconds()?;
        let text = output(&mut self.command(server.uri))?;
        let cpu_seconds = server.daemon.cpu_seconds()? - before;
        // The NBD engine prints a line of its own before the report.
        let report = text.find('{').map_or("", |at| &text[at..]);
        let parsed: Value = serde_json::from_str(report).map_err(|e| format!("fio's report: {e}"))?;
        let side = if self.access == Access::Read { "read" } else { "write" };
        let side = &parsed["jobs"][0][side];
        let number = |name: &str| {
            let number = side[name].as_f64().filter(|&number| number > 0.0);
            number.ok_or_else(|| format!("fio reports no {name} for {}", self.name()))
        };
        let (value, cost) = match self.shape {
            Shape::Random { .. } => (number("iops")? / 1e3, cpu_seconds * 1e6 / number("total_ios")?),
            Shape::Sequential => {
                let gib = number("io_bytes")? / f64::from(1 << 30);
                (number("bw_bytes")? / f64::from(1 << 20), cpu_seconds * 1e3 / gib)
            }
        };
        Ok(Sample { value, cost: Some(cost) })
    }

    fn command(&self, uri: &str) -> Command {
        let mut command = Command::new("fio");
        command.args(["--name=bench", "--ioengine=nbd", "--output-format=json", "--randrepeat=0"]);
        command.arg(format!("--uri={uri}"));
        let (order, bytes, depth) = match self.shape {
            Shape::Random { depth } => ("rand", "4k", depth),
            Shape::Sequential => ("", "1m", 4),
        };
        let access = if self.access == Access::Read { "read" } else { "write" };
        command.arg(format!("--rw={order}{access}"));
        command.arg(format!("--bs={bytes}")).arg(format!("--iodepth={depth}"));
        if self.access == Access::WriteFlushed {
            command.arg("--fsync=1");
        }
        match self.until {
            Until::Seconds(seconds) => command.arg("--time_based").arg(format!("--runtime={seconds}")),
            Until::OnceOrSeconds(seconds) => command.arg(format!("--runtime={seconds}")),
        };
        command
    }
}
