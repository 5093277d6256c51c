//! `capx playbook …`

use std::path::PathBuf;

use capx_core::domain::playbook;
use clap::Subcommand;
use owo_colors::{OwoColorize, Stream};
use serde_json::{Value, json};

use super::client::{Client, ServerArgs, list, part, path_of};
use super::run::{ParamArgs, begun, ended};
use super::{offline, show};
use crate::out;

/// `capx playbook …`
#[derive(Debug, Subcommand)]
pub enum PlaybookCommand {
    /// Say everything that is wrong with playbooks; needs no server.
    ///
    /// Ends with 0 when all are in order, with 1 when one is not.
    Check {
        /// The files; `-` for standard input.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// One JSON array, an object a file.
        #[arg(long)]
        json: bool,
    },
    /// Write playbooks in the one canonical form; needs no server.
    ///
    /// Every dialect becomes one, comments stay. Files are changed in place, standard
    /// input goes to standard output.
    Fmt {
        /// The files; `-` for standard input.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Change nothing; end with 1 when a file is not in that form.
        #[arg(long)]
        check: bool,
    },
    /// Print the JSON Schema of playbooks for editors; needs no server.
    Schema,
    /// Store a playbook; one whose name is known gets another version.
    Create {
        /// The file; `-` for standard input.
        #[arg(long, short)]
        file: PathBuf,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// List the playbooks, newest first.
    List {
        /// active, paused or archived.
        #[arg(long)]
        status: Option<String>,
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Show a playbook.
    Get {
        /// Its name or id.
        playbook: String,
        /// Its text, as it was stored.
        #[arg(long, conflicts_with = "json")]
        yaml: bool,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Compare two versions by what they mean.
    Diff {
        /// Its name or id.
        playbook: String,
        /// The earlier version; by default the one before the later.
        #[arg(long)]
        from: Option<u32>,
        /// The later version; by default the current one.
        #[arg(long)]
        to: Option<u32>,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Make an earlier version the current one again.
    Rollback {
        /// Its name or id.
        playbook: String,
        /// The number of the version.
        #[arg(value_name = "VERSION")]
        number: u32,
    },
    /// Run a playbook.
    Run {
        /// Its name or id.
        playbook: String,
        /// Its parameters.
        #[command(flatten)]
        params: ParamArgs,
        /// Follow the run until it ends.
        #[arg(long)]
        wait: bool,
        /// One JSON object: the run, with `--wait` when it has ended.
        #[arg(long)]
        json: bool,
    },
}

/// Runs a command.
pub async fn run(server: ServerArgs, command: PlaybookCommand) -> anyhow::Result<()> {
    let client = || Client::new(server);
    match command {
        PlaybookCommand::Check { files, json } => offline::check(&files, json),
        PlaybookCommand::Fmt { files, check } => offline::fmt(&files, check),
        PlaybookCommand::Schema => {
            show::json(&playbook::schema::schema());
            Ok(())
        }
        PlaybookCommand::Create { file, json } => create(&client()?, &file, json).await,
        PlaybookCommand::List { status, json } => list_all(&client()?, status.as_deref(), json).await,
        PlaybookCommand::Get { playbook, yaml, json } => {
            let client = client()?;
            let path = path_of(&client.playbook(&playbook).await?);
            let playbook = client.get(&path).await?["data"].take();
            match (yaml, json) {
                (true, _) => out::print(playbook["yaml"].as_str().unwrap_or_default()),
                (_, true) => show::json(&playbook),
                _ => get(&playbook),
            }
            Ok(())
        }
        PlaybookCommand::Diff { playbook, from, to, json } => diff(&client()?, &playbook, (from, to), json).await,
        PlaybookCommand::Rollback { playbook, number } => {
            let client = client()?;
            let path = path_of(&client.playbook(&playbook).await?);
            let now = client.post(&format!("{path}/rollback"), json!({"version": number})).await?;
            out::line(format_args!("{} is at version {}", show::text(&now["data"], "name"), now["data"]["version"]));
            Ok(())
        }
        PlaybookCommand::Run { playbook, params, wait, json } => {
            let client = client()?;
            let path = path_of(&client.playbook(&playbook).await?);
            let run = client.post(&format!("{path}/run"), json!({"params": params.to_object()})).await?;
            match (json, wait) {
                (true, true) => ended(&client, &run["data"]).await,
                (true, false) => {
                    show::json(&run["data"]);
                    Ok(())
                }
                (false, _) => begun(&client, &run["data"], wait).await,
            }
        }
    }
}

async fn create(client: &Client, file: &std::path::Path, as_json: bool) -> anyhow::Result<()> {
    let text = offline::read(file)?;
    // What is wrong is told with its place in the file, as `check` does.
    offline::refuse_broken(file, &text)?;
    let made = client.post(&format!("{}/playbooks", client.company().await?), json!({"yaml": text})).await?;
    let made = &made["data"];
    for warning in list(&made["warnings"]) {
        let word = "warning".if_supports_color(Stream::Stderr, |t| t.yellow()).to_string();
        out::aside(format_args!("{word}: {}\n", warning.as_str().unwrap_or_default()));
    }
    if as_json {
        show::json(made);
    } else {
        out::line(format_args!("{}  {} version {}", show::text(made, "id"), show::text(made, "name"), made["version"]));
        if let Some(secret) = made["webhook_secret"].as_str() {
            out::line(format_args!("webhook secret, shown this once: {secret}"));
        }
    }
    Ok(())
}

async fn list_all(client: &Client, status: Option<&str>, as_json: bool) -> anyhow::Result<()> {
    let status = status.map(|status| format!("&status={}", part(status))).unwrap_or_default();
    let all = client.all("playbooks", &status).await?;
    if as_json {
        show::json(&all);
        return Ok(());
    }
    let rows = list(&all).iter().map(|playbook| {
        ["id", "name", "status", "version", "step_count", "run_count", "last_run_at"]
            .map(|key| show::text(playbook, key))
    });
    let heads = ["ID", "NAME", "STATUS", "VERSION", "STEPS", "RUNS", "LAST RUN"];
    show::table(heads, rows.collect(), "no playbooks; store one with: capx playbook create --file FILE");
    Ok(())
}

fn get(playbook: &Value) {
    let text = |key: &str| show::text(playbook, key);
    out::line(format_args!(
        "{}  {}  {}  version {}",
        text("id"),
        text("name"),
        show::status(&text("status")),
        text("version")
    ));
    if playbook["description"].is_string() {
        out::line(format_args!("  {}", show::visible(&text("description"))));
    }
    let took = show::seconds(&playbook["avg_run_duration"]);
    let each = match playbook["run_count"].as_i64() {
        Some(0) | None => "no runs yet".to_owned(),
        Some(1) => format!("1 run, {} and {took}", show::usd(&playbook["avg_run_cost"])),
        Some(n) => format!("{n} runs, {} and {took} each", show::usd(&playbook["avg_run_cost"])),
    };
    out::line(format_args!("  {each}"));
    if playbook["next_run_at"].is_string() {
        out::line(format_args!("  next at {}", text("next_run_at")));
    }
    out::line("");
    let rows = list(&playbook["steps"])
        .iter()
        .map(|step| [show::text(step, "id"), show::text(step, "role"), show::text(step, "action")]);
    show::table(["STEP", "ROLE", "ACTION"], rows.collect(), "no steps");
}

async fn diff(
    client: &Client,
    playbook: &str,
    (from, to): (Option<u32>, Option<u32>),
    as_json: bool,
) -> anyhow::Result<()> {
    let path = path_of(&client.playbook(playbook).await?);
    let query: Vec<String> = [("from", from), ("to", to)]
        .into_iter()
        .filter_map(|(key, number)| Some(format!("{key}={}", number?)))
        .collect();
    let body = client.get(&format!("{path}/diff?{}", query.join("&"))).await?;
    let told = &body["data"];
    if as_json {
        show::json(told);
        return Ok(());
    }
    out::line(format_args!("version {} to {}", told["from"], told["to"]));
    let changes = list(&told["changes"]);
    for change in changes {
        let path = show::text(change, "path");
        match change["kind"].as_str().unwrap_or_default() {
            "added" => {
                out::line(format!("+ {path}: {}", change["to"]).if_supports_color(Stream::Stdout, |t| t.green()))
            }
            "removed" => {
                out::line(format!("- {path}: {}", change["from"]).if_supports_color(Stream::Stdout, |t| t.red()))
            }
            "moved" => out::line(format_args!("~ {path}: behind {} instead of {}", change["to"], change["from"])),
            _ => out::line(format_args!("~ {path}: {} -> {}", change["from"], change["to"])),
        }
    }
    if changes.is_empty() {
        out::line("they mean the same");
    }
    Ok(())
}
