//! What was measured, as a table or as JSON.

use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use serde_json::{Map, Value, json};

use super::Bench;

/// One measured figure.
struct Line {
    bench: &'static str,
    figure: &'static str,
    value: f64,
    unit: &'static str,
    /// What bare SQL reaches, for a ratio.
    limit: Option<f64>,
    /// What we want to reach.
    target: Option<Target>,
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

/// All the figures of one run.
pub(crate) struct Report {
    lines: Vec<Line>,
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
        Ok(Self { lines: Vec::new(), server, cores, quiet: bench.quiet })
    }

    pub(crate) fn add(
        &mut self,
        bench: &'static str,
        figure: &'static str,
        value: f64,
        unit: &'static str,
    ) -> &mut Self {
        self.lines.push(Line { bench, figure, value, unit, limit: None, target: None });
        self
    }

    /// What bare SQL reaches, for the figure just added.
    pub(crate) fn limit(&mut self, limit: f64) -> &mut Self {
        if let Some(line) = self.lines.last_mut() {
            line.limit = Some(limit);
        }
        self
    }

    /// What the figure just added should be.
    pub(crate) fn target(&mut self, target: Target) -> &mut Self {
        if let Some(line) = self.lines.last_mut() {
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
        table.set_header(["bench", "figure", "measured", "unit", "of limit", "target", ""]);
        for line in &self.lines {
            let ratio = line.limit.map(|limit| format!("{:.0} %", 100.0 * line.value / limit)).unwrap_or_default();
            let (target, met) = match line.target {
                None => (String::new(), ""),
                Some(target) => (target.describe(), if target.is_met(line.value) { "met" } else { "MISSED" }),
            };
            table.add_row([line.bench, line.figure, &number(line.value), line.unit, &ratio, &target, met]);
        }
        println!("{}, {} cores shared with the server", self.server, self.cores);
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
                object.insert("value".into(), line.value.into());
                object.insert("unit".into(), line.unit.into());
                if let Some(limit) = line.limit {
                    object.insert("limit".into(), limit.into());
                    object.insert("of_limit".into(), (line.value / limit).into());
                }
                if let Some(target) = line.target {
                    object.insert("target".into(), target.describe().into());
                    object.insert("met".into(), target.is_met(line.value).into());
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
