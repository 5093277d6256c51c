//! `capx run …`

use std::io::{IsTerminal, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use capx_core::domain::digest::{hex, sha256};
use clap::{Args, Subcommand};
use owo_colors::{OwoColorize, Stream};
use serde_json::{Map, Value, json};

use super::client::{self, Client, part, path_of, path_of_run};
use super::exit::{AWAY, Exit, FAILED, WRONG};
use super::show;
use super::stream::Events;
use crate::out;

/// Seconds that the server is asked to hold an answer for a run's end.
const WAIT_S: u32 = 30;
/// The names of events stand in a column.
const EVENT_WIDTH: usize = 20;
/// Before a stream that has ended is asked again.
const PAUSE: Duration = Duration::from_millis(500);

/// `capx run …`
#[derive(Debug, Subcommand)]
pub enum RunCommand {
    /// Show a run: its steps, what it has cost, and what it waits for.
    Get {
        /// `run_…`
        run: String,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// List the runs of a playbook, newest first.
    List {
        /// Its name or id.
        playbook: String,
        /// queued, running, suspended, completed, failed or cancelled.
        #[arg(long)]
        status: Option<String>,
        /// How many.
        #[arg(long, default_value_t = 25)]
        limit: u32,
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Follow a run until it ends.
    ///
    /// Ends with 0 when it completes, with 1 when it does not. Ctrl-C ends the
    /// watching, not the run.
    Watch {
        /// `run_…`
        run: String,
        /// One JSON object an event, a line each.
        #[arg(long)]
        json: bool,
    },
    /// Write the bytes of an artifact, to standard output or into a file.
    Artifact {
        /// The digest that stands in an output as `artifact`.
        artifact: String,
        /// Write them into this file.
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// Cancel a run; once more, should it still be closing.
    Cancel {
        /// `run_…`
        run: String,
    },
    /// Let a failed run go on at the step that failed.
    Retry {
        /// `run_…`
        run: String,
        /// Follow it until it ends.
        #[arg(long)]
        wait: bool,
    },
    /// Play a run again as a new one, with the same parameters or others.
    Replay {
        /// `run_…`
        run: String,
        /// The step to begin with, by its id or its place from 0; what those before
        /// it have done is kept.
        #[arg(long)]
        from: Option<String>,
        /// Its parameters.
        #[command(flatten)]
        params: ParamArgs,
        /// Follow it until it ends.
        #[arg(long)]
        wait: bool,
    },
}

/// What a run is given.
#[derive(Debug, Args)]
pub struct ParamArgs {
    /// A parameter, as often as needed: `-p topic=tides -p count=3 -p tags='["a"]'`.
    /// What reads as JSON is JSON, all else is text.
    #[arg(short = 'p', long = "param", value_name = "KEY=VALUE", value_parser = pair)]
    params: Vec<(String, Value)>,
}

impl ParamArgs {
    /// As one object.
    pub fn to_object(&self) -> Map<String, Value> {
        self.params.iter().cloned().collect()
    }
}

fn pair(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    if key.is_empty() {
        return Err("must be KEY=VALUE".into());
    }
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    Ok((key.to_owned(), value))
}

/// Runs a command.
pub async fn run(client: &Client, command: RunCommand) -> anyhow::Result<()> {
    match command {
        RunCommand::Get { run, json } => {
            let run = client.run(&run).await?;
            if json { show::json(&run) } else { show::run(&run) }
        }
        RunCommand::List { playbook, status, limit, json } => {
            list(client, &playbook, status.as_deref(), limit, json).await?;
        }
        RunCommand::Watch { run, json } => {
            let run = client.run(&run).await?;
            return watch(client, &run, json).await;
        }
        RunCommand::Artifact { artifact, file } => {
            let bytes = client.bytes(&format!("{}/artifacts/{}", client.company().await?, part(&artifact))).await?;
            if hex(&sha256(&bytes)) != artifact {
                bail!(Exit::with(AWAY, "what came is not what the digest names; ask for it again"));
            }
            save(&bytes, file.as_deref())?;
        }
        RunCommand::Cancel { run } => {
            let path = path_of_run(&client.run(&run).await?);
            let run = client.post(&format!("{path}/cancel"), json!({})).await?;
            show::run(&run["data"]);
        }
        RunCommand::Retry { run, wait } => {
            let path = path_of_run(&client.run(&run).await?);
            let run = client.post(&format!("{path}/retry"), json!({})).await?;
            return begun(client, &run["data"], wait).await;
        }
        RunCommand::Replay { run, from, params, wait } => {
            let path = path_of_run(&client.run(&run).await?);
            let mut body = json!({"params": params.to_object()});
            if let Some(from) = from {
                body["from_step"] = from.parse::<u16>().map_or(Value::String(from), Value::from);
            }
            let run = client.post(&format!("{path}/replay"), body).await?;
            return begun(client, &run["data"], wait).await;
        }
    }
    Ok(())
}

/// Says which run has begun, or follows it to its end.
pub(super) async fn begun(client: &Client, run: &Value, wait: bool) -> anyhow::Result<()> {
    if wait {
        return watch(client, run, false).await;
    }
    out::line(show::text(run, "run_id"));
    out::aside(format_args!("follow it with: capx run watch {}\n", show::text(run, "run_id")));
    Ok(())
}

/// Waits for a run's end and shows it as JSON, for programs.
pub(super) async fn ended(client: &Client, run: &Value) -> anyhow::Result<()> {
    let path = format!("{}?wait={WAIT_S}", path_of_run(run));
    loop {
        let run = &client.get(&path).await?["data"];
        if let Some(ended) = outcome(run) {
            show::json(run);
            return ended;
        }
    }
}

/// What a run that has ended says of itself; none while it goes on.
fn outcome(run: &Value) -> Option<anyhow::Result<()>> {
    match run["status"].as_str()? {
        "completed" => Some(Ok(())),
        status @ ("failed" | "cancelled") => Some(Err(Exit::with(FAILED, format!("the run is {status}")))),
        _ => None,
    }
}

async fn list(client: &Client, playbook: &str, status: Option<&str>, limit: u32, json: bool) -> anyhow::Result<()> {
    let playbook = client.playbook(playbook).await?;
    let status = status.map(|status| format!("&status={}", part(status))).unwrap_or_default();
    let body = client.get(&format!("{}/runs?limit={limit}{status}", path_of(&playbook))).await?;
    if json {
        show::json(&body["data"]);
        return Ok(());
    }
    let rows = client::list(&body["data"]).iter().map(|run| {
        [
            show::text(run, "run_id"),
            show::text(run, "status"),
            show::usd(&run["cost"]),
            show::seconds(&run["duration"]),
            show::text(run, "started_at"),
        ]
    });
    show::table(["RUN", "STATUS", "COST", "TOOK", "STARTED"], rows.collect(), "no runs");
    Ok(())
}

/// Tells what happens in a run until it ends, and how it did.
pub(super) async fn watch(client: &Client, run: &Value, as_json: bool) -> anyhow::Result<()> {
    let path = path_of_run(run);
    let id = show::text(run, "run_id");
    if !as_json {
        out::aside(format_args!("{id}\n"));
    }
    let mut events = Events::of(client, format!("{path}/events"));
    loop {
        while let Some(event) = events.next().await? {
            tell(client, &id, &event, as_json).await?;
        }
        // The stream ends with the run, or with its connection.
        let now = client.run(&id).await?;
        if let Some(ended) = outcome(&now) {
            if !as_json {
                show::run(&now);
            }
            return ended;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn tell(client: &Client, run: &str, event: &Value, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        out::line(event);
        return Ok(());
    }
    let at = event["timestamp"].as_str().and_then(|at| at.get(11..19)).unwrap_or_default();
    let name = show::text(event, "event");
    let blanks = " ".repeat(EVENT_WIDTH.saturating_sub(name.len()));
    let cost = match event["data"]["cost"].as_f64() {
        Some(cost) if cost > 0.0 => format!("  {}", show::usd(&event["data"]["cost"])),
        _ => String::new(),
    };
    let summary = show::visible(&show::text(event, "summary"));
    let time = at.if_supports_color(Stream::Stdout, |t| t.dimmed()).to_string();
    out::line(format_args!("{time}  {}{blanks}  {summary}{cost}", show::status(&name)));
    if event["event"] == "playbook.suspended" || event["data"]["sleeps"].is_string() {
        // It may have gone on since.
        for wait in show::waits(&client.run(run).await?) {
            out::line(format_args!("          waits for {wait}"));
        }
    }
    Ok(())
}

/// Into a file, or to standard output where that does no harm.
fn save(bytes: &[u8], file: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = file else {
        let steers = |text: &str| text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t'));
        if stdout().is_terminal() && std::str::from_utf8(bytes).map_or(true, steers) {
            bail!(Exit::with(WRONG, "it is no plain text: write it into a file, with --file or `>`"));
        }
        out::bytes(bytes);
        return Ok(());
    };
    std::fs::write(path, bytes).map_err(|error| Exit::with(WRONG, format!("cannot write {}: {error}", path.display())))
}
