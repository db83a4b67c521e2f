//! Sizes and durations as people write and read them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes; `K`, `M`, `G` and `T` are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(text: &str) -> Result<ByteSize, String> {
        let wrong = || format!("'{text}' is not a size: use a number and one of K, M, G, T, such as 20G");
        let upper = text.to_ascii_uppercase();
        let plain = upper.trim_end_matches("IB").trim_end_matches('B');
        let digits = plain.trim_end_matches(['K', 'M', 'G', 'T']);
        let shift = match &plain[digits.len()..] {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        let mut unit = "B";
        for next in ["KiB", "MiB", "GiB", "TiB"] {
            if value < 1024.0 {
                break;
            }
            value /= 1024.0;
            unit = next;
        }
        let decimals = usize::from(unit != "B" && value < 100.0);
        f.pad(&format!("{value:.decimals$} {unit}"))
    }
}

/// Parses `90s`, `10m`, `2h`, `500ms` or `7d`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a duration: use a number and one of ms, s, m, h, d, such as 90s");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let unit_ms = match &text[digits.len()..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(wrong)
}

/// A duration as a person reads it: `12 ms`, `3.4 s`, `2 min 05 s`.
pub fn show_ms(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..120_000 => format!("{:.1} s", ms as f64 / 1000.0),
        _ => format!("{} min {:02} s", ms / 60_000, ms % 60_000 / 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_and_overflow_is_refused() {
        assert_eq!("20G".parse(), Ok(ByteSize(20 << 30)));
        assert_eq!("512".parse(), Ok(ByteSize(512)));
        assert!("1.5G".parse::<ByteSize>().is_err());
        assert_eq!("64KiB".parse(), Ok(ByteSize(65536)));
        for bad in ["", "G", "-1G", "1X", "99999999999T", "1GG"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad:?}");
        }
        assert_eq!(ByteSize(86 << 20).to_string(), "86.0 MiB");
        assert_eq!(ByteSize(100).to_string(), "100 B");
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["", "5", "s", "5 s", "5y", "-1s"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
        assert_eq!(show_ms(125_000), "2 min 05 s");
    }
}
