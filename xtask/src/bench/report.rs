//! Figures: how rounds become a ratio, and how they are printed.

use serde::Serialize;

use super::Outcome;
use super::machine::Machine;

/// The median of some rounds, with the lowest and the highest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Spread {
    /// Of at least one value.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.into_iter().collect();
        assert!(!values.is_empty(), "there is at least one round");
        values.sort_by(f64::total_cmp);
        let (below, above) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Spread { median: f64::midpoint(below, above), low: values[0], high: values[values.len() - 1] }
    }
}

/// Which of two figures is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    More,
    Less,
}

/// What one round gave.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// In the row's unit.
    pub(super) value: f64,
    /// Processor time in the row's unit of cost.
    pub(super) cost: Option<f64>,
}

/// Ours and a peer's samples, taken in turn.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    ours: Vec<Sample>,
    peer: Vec<Sample>,
}

impl Rounds {
    /// Lets both take turns `rounds` times. Who begins changes every round, so that neither always finds
    /// what the other left.
    pub(super) fn take(
        rounds: u32,
        mut ours: impl FnMut() -> Outcome<Sample>,
        mut peer: impl FnMut() -> Outcome<Sample>,
    ) -> Outcome<Rounds> {
        let mut taken = Rounds::default();
        for round in 0..rounds {
            if round % 2 == 0 {
                taken.ours.push(ours()?);
                taken.peer.push(peer()?);
            } else {
                taken.peer.push(peer()?);
                taken.ours.push(ours()?);
            }
        }
        Ok(taken)
    }

    /// Rounds that were taken otherwise, as many of ours as of the peer.
    pub(super) fn of(ours: Vec<Sample>, peer: Vec<Sample>) -> Rounds {
        assert_eq!(ours.len(), peer.len(), "each round has both");
        Rounds { ours, peer }
    }

    /// The row of these rounds. The ratio is above 1 where ours is better.
    pub(super) fn row(&self, what: impl Into<String>, unit: &'static str, better: Better) -> Row {
        let ratio = |(ours, peer): (&Sample, &Sample)| match better {
            Better::More => ours.value / peer.value,
            Better::Less => peer.value / ours.value,
        };
        let values = |samples: &[Sample]| Spread::of(samples.iter().map(|sample| sample.value));
        let cost = |samples: &[Sample]| {
            let costs: Option<Vec<f64>> = samples.iter().map(|sample| sample.cost).collect();
            costs.map(|costs| Spread::of(costs).median)
        };
        Row {
            what: what.into(),
            unit,
            ours: values(&self.ours),
            peer: Some(values(&self.peer)),
            ratio: Some(Spread::of(self.ours.iter().zip(&self.peer).map(ratio))),
            cost_ours: cost(&self.ours),
            cost_peer: cost(&self.peer),
            bar: None,
        }
    }
}

/// What a figure must hold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bar {
    /// The ratio is at least this.
    RatioMin(f64),
    /// Our own figure is at least this.
    OursMin(f64),
    /// Our own figure is at most this.
    OursMax(f64),
}

/// One line of a table.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    what: String,
    unit: &'static str,
    ours: Spread,
    peer: Option<Spread>,
    ratio: Option<Spread>,
    cost_ours: Option<f64>,
    cost_peer: Option<f64>,
    bar: Option<Bar>,
}

impl Row {
    /// A figure of ours that nothing is compared with.
    pub(super) fn alone(what: impl Into<String>, unit: &'static str, ours: Spread) -> Row {
        let what = what.into();
        Row { what, unit, ours, peer: None, ratio: None, cost_ours: None, cost_peer: None, bar: None }
    }

    /// Sets what the figure must hold.
    pub(super) fn with_bar(self, bar: Bar) -> Row {
        Row { bar: Some(bar), ..self }
    }

    /// Whether the figure holds what it must; [`None`] if there is no such thing.
    fn holds(&self) -> Option<bool> {
        Some(match self.bar? {
            Bar::RatioMin(bar) => self.ratio?.median >= bar,
            Bar::OursMin(bar) => self.ours.median >= bar,
            Bar::OursMax(bar) => self.ours.median <= bar,
        })
    }

    fn cells(&self) -> [String; 7] {
        let with_spread = |s: Spread| format!("{} ({}-{})", short(s.median), short(s.low), short(s.high));
        let or_nothing = |text: Option<String>| text.unwrap_or_default();
        let bar = self.bar.map(|bar| match bar {
            Bar::RatioMin(bar) => format!(">= {bar}x"),
            Bar::OursMin(bar) => format!(">= {}", short(bar)),
            Bar::OursMax(bar) => format!("<= {}", short(bar)),
        });
        let verdict = self.holds().map_or("", |holds| if holds { " holds" } else { " BELOW" });
        [
            format!("{} [{}]", self.what, self.unit),
            with_spread(self.ours),
            or_nothing(self.peer.map(with_spread)),
            or_nothing(self.ratio.map(|s| format!("{:.2}x ({:.2}-{:.2})", s.median, s.low, s.high))),
            or_nothing(self.cost_ours.map(short)),
            or_nothing(self.cost_peer.map(short)),
            or_nothing(bar.map(|bar| bar + verdict)),
        ]
    }
}

/// Three significant digits, and no exponent.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Rows that belong together.
#[derive(Debug, Serialize)]
pub(super) struct Table {
    pub(super) title: &'static str,
    /// Who the peer is, and what both do.
    pub(super) notes: Vec<String>,
    /// What `cost_ours` and `cost_peer` count.
    pub(super) cost_unit: &'static str,
    pub(super) rows: Vec<Row>,
}

impl Table {
    pub(super) fn print(&self) {
        println!("\n{}", self.title);
        for note in &self.notes {
            println!("  {note}");
        }
        let ours = format!("CPU OURS [{}]", self.cost_unit);
        let head = ["WHAT", "OURS", "PEER", "RATIO", &ours, "CPU PEER", "BAR"].map(str::to_owned);
        let lines: Vec<[String; 7]> = std::iter::once(head).chain(self.rows.iter().map(Row::cells)).collect();
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        // A column in which only the head stands tells nothing.
        let columns: Vec<(usize, usize)> = (0..7)
            .filter(|&column| lines[1..].iter().any(|line| !line[column].is_empty()))
            .map(|column| (column, width(column)))
            .collect();
        for line in &lines {
            let cells: Vec<String> =
                columns.iter().map(|&(i, width)| format!("{:width$}", line[i])).collect();
            println!("  {}", cells.join("  ").trim_end());
        }
    }
}

/// All that was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    rounds: u32,
    pub(super) tables: Vec<Table>,
}

impl Report {
    pub(super) fn new(machine: Machine, rounds: u32) -> Report {
        Report { machine, rounds, tables: Vec::new() }
    }

    /// For people.
    pub(super) fn print(&self) -> Outcome {
        self.machine.print();
        println!("median of {} rounds in which both took turns (lowest-highest)", self.rounds);
        self.tables.iter().for_each(Table::print);
        Ok(())
    }

    /// For programs.
    pub(super) fn print_json(&self) -> Outcome {
        let text = serde_json::to_string_pretty(self).map_err(|e| format!("cannot print the report: {e}"))?;
        println!("{text}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(ours: &[f64], peer: &[f64]) -> Rounds {
        let samples = |values: &[f64]| values.iter().map(|&value| Sample { value, cost: None }).collect();
        Rounds { ours: samples(ours), peer: samples(peer) }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(Spread::of([4.0, 1.0, 3.0, 2.0]), Spread { median: 2.5, low: 1.0, high: 4.0 });
        assert_eq!(Spread::of([3.0, 1.0, 2.0]).median, 2.0);
    }

    #[test]
    fn the_ratio_pairs_each_round_with_its_own() {
        // A machine that is slow for a whole round is slow for both, and the ratio does not show it.
        let rounds = taken(&[100.0, 10.0, 200.0], &[50.0, 5.0, 100.0]);
        let ratio = rounds.row("", "", Better::More).ratio.unwrap();
        assert_eq!(ratio, Spread { median: 2.0, low: 2.0, high: 2.0 });
    }

    #[test]
    fn a_ratio_above_one_means_that_ours_is_better_whichever_way_is_up() {
        let rounds = taken(&[1.0], &[2.0]);
        assert_eq!(rounds.row("", "", Better::More).ratio.unwrap().median, 0.5);
        assert_eq!(rounds.row("", "", Better::Less).ratio.unwrap().median, 2.0);
    }

    #[test]
    fn a_bar_is_judged_by_the_figure_that_it_is_about() {
        let row = || taken(&[9.0], &[10.0]).row("", "", Better::More);
        assert_eq!(row().holds(), None);
        assert_eq!(row().with_bar(Bar::RatioMin(1.0)).holds(), Some(false));
        assert_eq!(row().with_bar(Bar::OursMin(9.0)).holds(), Some(true));
        assert_eq!(row().with_bar(Bar::OursMax(8.0)).holds(), Some(false));
    }

    #[test]
    fn both_sides_begin_in_turn() {
        let order = std::cell::RefCell::new(String::new());
        let side = |name| {
            let order = &order;
            move || {
                order.borrow_mut().push(name);
                Ok(Sample { value: 1.0, cost: None })
            }
        };
        Rounds::take(3, side('a'), side('b')).unwrap();
        assert_eq!(*order.borrow(), "abbaab");
    }
}
