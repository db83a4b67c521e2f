//! Distributions, and the tables that show them: what a single median would hide is what a guest notices.

use serde::Serialize;

/// The median, the 99th percentile and the highest of some values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Figures {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Figures {
    /// [`None`] if there are no values. With fewer than a hundred, the 99th percentile is the highest.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Figures> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let percentile = |percent: usize| values[(values.len() * percent).div_ceil(100) - 1];
        (!values.is_empty()).then(|| Figures {
            p50: percentile(50),
            p99: percentile(99),
            max: percentile(100),
        })
    }
}

/// Of a distribution of fewer than a hundred values, the 99th percentile says nothing.
fn text(figures: Option<Figures>) -> String {
    match figures {
        None => "–".to_owned(),
        Some(Figures { p50, p99, max }) if p99 == max => format!("{} / {}", short(p50), short(max)),
        Some(Figures { p50, p99, max }) => format!("{} / {} / {}", short(p50), short(p99), short(max)),
    }
}

/// Three significant digits, and no exponent.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Rows that belong together.
#[derive(Debug, Serialize)]
pub(super) struct Sheet {
    pub(super) title: String,
    pub(super) notes: Vec<String>,
    /// Of the cells; the first column says what a row is about.
    pub(super) columns: Vec<&'static str>,
    pub(super) rows: Vec<(String, Vec<Option<Figures>>)>,
    /// How long it took to measure all of this.
    pub(super) seconds: f64,
}

impl Sheet {
    /// As the documentation has it.
    pub(super) fn print(&self) {
        println!("\n{} ({:.0} s)", self.title, self.seconds);
        for note in &self.notes {
            println!("  {note}");
        }
        println!("\n| what | {} |", self.columns.join(" | "));
        println!("|---|{}", "---|".repeat(self.columns.len()));
        for (what, cells) in &self.rows {
            let cells: Vec<String> = cells.iter().map(|cell| text(*cell)).collect();
            println!("| {what} | {} |", cells.join(" | "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_came() {
        let figures = Figures::of((1..=200).map(f64::from)).unwrap();
        assert_eq!(figures, Figures { p50: 100.0, p99: 198.0, max: 200.0 });
        assert_eq!(Figures::of([3.0]), Some(Figures { p50: 3.0, p99: 3.0, max: 3.0 }));
        assert_eq!(Figures::of([]), None);
    }

    #[test]
    fn a_distribution_of_few_values_has_no_p99_of_its_own() {
        assert_eq!(text(Figures::of([0.0, 250.4])), "0 / 250");
        assert_eq!(text(Figures::of((1..=200).map(f64::from))), "100 / 198 / 200");
        assert_eq!(text(None), "–");
    }
}
