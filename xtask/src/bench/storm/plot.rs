//! A storm over time as an SVG file, drawn by hand: readable on light and on dark paper.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;

use super::super::Outcome;
use super::figures::Run;
use super::report::Report;
use super::watch::Point;

/// Size of one panel's drawing area and the room around it, in pixels.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 180.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 64.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 44.0;

/// Lines between bottom and top of a panel, and between its left and its right.
const STEPS: u32 = 4;

/// Colours that keep their contrast on white and on black.
const STYLE: &str = "\
text{font:12px sans-serif;fill:#767676}\
.title{font-weight:bold}\
.grid{stroke:#888;stroke-opacity:.3}\
path{fill:none;stroke-width:2}\
.a{stroke:#2a7de1}.b{stroke:#e0562b}.c{stroke:#3a9d4f}.d{stroke:#a569bd}\
.la{fill:#2a7de1}.lb{fill:#e0562b}.lc{fill:#3a9d4f}.ld{fill:#a569bd}";

/// Draws each run: above what moved, below what was done.
pub(super) fn write(mut file: File, report: &Report) -> Outcome {
    let svg = draw(&report.runs);
    file.write_all(svg.as_bytes()).map_err(|e| format!("cannot write the drawing: {e}"))
}

/// A line of a panel: its name, its class, and what it shows.
type Line = (&'static str, char, fn(&Point) -> f64);

fn draw(runs: &[Run]) -> String {
    let panel = TOP + HEIGHT + BOTTOM;
    let mut body = String::new();
    for (n, run) in runs.iter().enumerate() {
        let at = n as f64 * 2.0 * panel;
        let received: Line = ("received by all nodes", 'a', |point| point.received_mb_per_second);
        let sent: Line = ("sent by the origin", 'b', |point| point.origin_sent_mb_per_second);
        let finished: Line = ("VMs finished", 'c', |point| point.vms_finished as f64);
        let complete: Line = ("nodes with the boot set", 'd', |point| point.nodes_complete as f64);
        draw_panel(&mut body, at, &run.name, &run.points, "MB/s", &[received, sent]);
        draw_panel(&mut body, at + panel, &run.name, &run.points, "number", &[finished, complete]);
    }
    let (width, height) = (LEFT + WIDTH + RIGHT, panel * 2.0 * runs.len() as f64);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\"><style>{STYLE}</style>\n{body}</svg>\n"
    )
}

fn draw_panel(out: &mut String, top: f64, title: &str, points: &[Point], unit: &str, lines: &[Line]) {
    let seconds = round_up(points.last().map_or(1.0, |point| point.seconds));
    let highest =
        points.iter().flat_map(|point| lines.iter().map(|(_, _, of)| of(point))).fold(0.0, f64::max);
    let highest = round_up(highest);
    let x = |value: f64| LEFT + value / seconds * WIDTH;
    let y = |value: f64| top + TOP + HEIGHT - value / highest * HEIGHT;
    let mut text = |x: f64, y: f64, anchor: &str, class: &str, text: &str| {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            out,
            "<text x=\"{x:.0}\" y=\"{y:.0}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"
        );
    };
    text(LEFT, top + 18.0, "start", "title", title);
    for (n, (name, class, _)) in lines.iter().enumerate() {
        text(LEFT + WIDTH - 190.0 * n as f64, top + 18.0, "end", &format!("l{class}"), name);
    }
    text(LEFT + WIDTH / 2.0, top + TOP + HEIGHT + 36.0, "middle", "", "seconds since the beginning");
    text(8.0, top + TOP - 8.0, "start", "", unit);
    for step in 0..=STEPS {
        let part = f64::from(step) / f64::from(STEPS);
        text(LEFT - 8.0, y(highest * part) + 4.0, "end", "", &label(highest * part));
        text(x(seconds * part), top + TOP + HEIGHT + 18.0, "middle", "", &label(seconds * part));
    }
    for step in 0..=STEPS {
        let at = y(highest * f64::from(step) / f64::from(STEPS));
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
            LEFT + WIDTH
        );
    }
    for (_, class, of) in lines {
        let path: Vec<String> =
            points.iter().map(|point| format!("{:.1},{:.1}", x(point.seconds), y(of(point)))).collect();
        if !path.is_empty() {
            let _ = writeln!(out, "<path class=\"{class}\" d=\"M{}\"/>", path.join("L"));
        }
    }
}

/// The next of 1, 2, 4 and 8 times a power of ten: quarters of it are short numbers.
fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.max(0.1).log10().floor());
    [1.0, 2.0, 4.0, 8.0, 10.0]
        .map(|step| step * power)
        .into_iter()
        .find(|&step| step >= value)
        .unwrap_or(power * 10.0)
}

fn label(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drawing_has_a_line_for_each_quantity_and_its_names_are_escaped() {
        let point = |seconds| Point {
            seconds,
            received_mb_per_second: 3.0,
            origin_sent_mb_per_second: 1.0,
            vms_finished: 2,
            nodes_complete: 1,
        };
        let mut run = Run::of_stories("a<b".to_owned(), 1, &[], 1.0);
        run.points = vec![point(0.2), point(0.4)];
        let svg = draw(&[run]);
        assert_eq!(svg.matches("<path").count(), 4, "{svg}");
        assert!(svg.contains("a&lt;b") && svg.contains("MB/s") && svg.contains("seconds"), "{svg}");
    }

    #[test]
    fn axes_end_at_numbers_whose_quarters_are_short() {
        assert_eq!([0.7, 1.0, 3.0, 41.0, 97.0].map(round_up), [0.8, 1.0, 4.0, 80.0, 100.0]);
        assert_eq!(label(0.25), "0.25");
        assert_eq!(label(10.0), "10");
    }
}
