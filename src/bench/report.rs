//! What was measured, as a table or as JSON: of each figure the median of the
//! passes, and how far they lay apart.

use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use serde_json::{Map, Value, json};

use super::Bench;

/// One figure, of every pass.
struct Line {
    bench: &'static str,
    figure: &'static str,
    values: Vec<f64>,
    unit: &'static str,
    /// The same as a share of what bare SQL did in its pass.
    ratios: Vec<f64>,
    /// What we want to reach.
    target: Option<Target>,
}

impl Line {
    fn value(&self) -> f64 {
        median(&self.values)
    }

    fn ratio(&self) -> Option<f64> {
        (!self.ratios.is_empty()).then(|| median(&self.ratios))
    }

    /// The least and the greatest, where there was more than one pass.
    fn spread(&self) -> Option<(f64, f64)> {
        let least = self.values.iter().copied().fold(f64::INFINITY, f64::min);
        let greatest = self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (self.values.len() > 1).then_some((least, greatest))
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle.wrapping_sub(1)), sorted.get(middle)) {
        (Some(below), Some(above)) if sorted.len().is_multiple_of(2) => (below + above) / 2.0,
        (_, Some(middle)) => *middle,
        _ => f64::NAN,
    }
}

/// What a figure should be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(wanted) => value >= wanted,
            Self::AtMost(wanted) => value <= wanted,
        }
    }

    fn describe(self) -> String {
        match self {
            Self::AtLeast(wanted) => format!(">= {}", number(wanted)),
            Self::AtMost(wanted) => format!("<= {}", number(wanted)),
        }
    }
}

/// All the figures.
pub(crate) struct Report {
    lines: Vec<Line>,
    /// The line of the figure just added.
    last: usize,
    server: String,
    cores: usize,
    quiet: bool,
}

impl Report {
    pub(crate) async fn new(bench: &Bench) -> anyhow::Result<Self> {
        let server: String = sqlx::query_scalar(
            "select 'PostgreSQL ' || current_setting('server_version') || ', synchronous_commit='
                || current_setting('synchronous_commit') || ', fsync=' || current_setting('fsync')",
        )
        .fetch_one(&bench.pool)
        .await?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { lines: Vec::new(), last: 0, server, cores, quiet: bench.quiet })
    }

    pub(crate) fn add(
        &mut self,
        bench: &'static str,
        figure: &'static str,
        value: f64,
        unit: &'static str,
    ) -> &mut Self {
        let known = self.lines.iter().position(|line| (line.bench, line.figure) == (bench, figure));
        self.last = known.unwrap_or(self.lines.len());
        match self.lines.get_mut(self.last) {
            Some(line) => line.values.push(value),
            None => {
                self.lines.push(Line { bench, figure, values: vec![value], unit, ratios: Vec::new(), target: None })
            }
        }
        self
    }

    /// What bare SQL reaches, for the figure just added.
    pub(crate) fn limit(&mut self, limit: f64) -> &mut Self {
        if let Some(line) = self.lines.get_mut(self.last) {
            let value = line.values.last().copied().unwrap_or(f64::NAN);
            line.ratios.push(value / limit);
        }
        self
    }

    /// What the figure just added should be.
    pub(crate) fn target(&mut self, target: Target) -> &mut Self {
        if let Some(line) = self.lines.get_mut(self.last) {
            line.target = Some(target);
        }
        self
    }

    #[expect(clippy::print_stdout, reason = "the command's output")]
    pub(crate) fn print(&self, as_json: bool) {
        if as_json {
            println!("{}", self.json());
            return;
        }
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY);
        table.set_header(["bench", "figure", "median", "unit", "least - greatest", "of limit", "target", ""]);
        for line in &self.lines {
            let value = line.value();
            let ratio = line.ratio().map(|ratio| format!("{:.0} %", 100.0 * ratio)).unwrap_or_default();
            let spread = line.spread().map(|(a, b)| format!("{} - {}", number(a), number(b))).unwrap_or_default();
            let (target, met) = match line.target {
                None => (String::new(), ""),
                Some(target) => (target.describe(), if target.is_met(value) { "met" } else { "MISSED" }),
            };
            table.add_row([line.bench, line.figure, &number(value), line.unit, &spread, &ratio, &target, met]);
        }
        let passes = self.lines.iter().map(|line| line.values.len()).max().unwrap_or(0);
        println!("{}, {} cores shared with the server, {passes} passes", self.server, self.cores);
        println!("{table}");
    }

    fn json(&self) -> Value {
        let figures: Vec<Value> = self
            .lines
            .iter()
            .map(|line| {
                let mut object = Map::new();
                object.insert("bench".into(), line.bench.into());
                object.insert("figure".into(), line.figure.into());
                object.insert("value".into(), line.value().into());
                object.insert("passes".into(), line.values.clone().into());
                object.insert("unit".into(), line.unit.into());
                if let Some(ratio) = line.ratio() {
                    object.insert("of_limit".into(), ratio.into());
                }
                if let Some(target) = line.target {
                    object.insert("target".into(), target.describe().into());
                    object.insert("met".into(), target.is_met(line.value()).into());
                }
                Value::Object(object)
            })
            .collect();
        json!({"version": env!("CARGO_PKG_VERSION"), "server": self.server, "cores": self.cores, "figures": figures})
    }

    /// A bar on the terminal, or nothing where nobody looks.
    pub(crate) fn progress(&self, what: &str, total: u64) -> indicatif::ProgressBar {
        if self.quiet {
            return indicatif::ProgressBar::hidden();
        }
        let bar = indicatif::ProgressBar::new(total).with_message(what.to_owned());
        if let Ok(style) =
            indicatif::ProgressStyle::with_template("{msg:32} {bar:40} {human_pos}/{human_len} {per_sec}")
        {
            bar.set_style(style);
        }
        bar
    }
}

/// A number for people: grouped when large, with decimals when small.
fn number(value: f64) -> String {
    if value.abs() < 100.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut grouped = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(c);
    }
    grouped
}
