//! `capx webhook …`

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::{Client, list, part};
use super::show;
use crate::out;

/// `capx webhook …`
#[derive(Debug, Subcommand)]
pub enum WebhookCommand {
    /// Register a URL that is told of events; its secret is shown this once.
    Create {
        /// `https://…`
        url: String,
        /// A name such as playbook.failed, a family such as step.*, or *; may be repeated.
        #[arg(long = "event", required = true)]
        events: Vec<String>,
        /// `co_…`: of this company alone.
        #[arg(long)]
        only: Option<String>,
        /// Events of one run one after another.
        #[arg(long)]
        ordered: bool,
    },
    /// List webhooks, and how they are.
    List {
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Send a test, and wait for its answer.
    Test {
        /// `wh_…`
        webhook: String,
        /// The type that it has.
        #[arg(long)]
        event: Option<String>,
    },
    /// List what a webhook was told, newest first.
    Deliveries {
        /// `wh_…`
        webhook: String,
        /// pending, succeeded or failed.
        #[arg(long)]
        status: Option<String>,
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Send again: one delivery, or all since a time that failed, or were missed.
    Redeliver {
        /// `wh_…`
        webhook: String,
        /// `dlv_…`
        #[arg(conflicts_with = "since", required_unless_present = "since")]
        delivery: Option<String>,
        /// A date, or a time such as 2026-05-25T10:00:00Z.
        #[arg(long)]
        since: Option<String>,
        /// failed, missing or all.
        #[arg(long, requires = "since", default_value = "failed")]
        status: String,
    },
    /// Give a webhook another secret; the old one signs too for 24 hours.
    RotateSecret {
        /// `wh_…`
        webhook: String,
    },
    /// Send to it again.
    Enable {
        /// `wh_…`
        webhook: String,
    },
    /// Send to it no more; what is under way is kept.
    Disable {
        /// `wh_…`
        webhook: String,
    },
    /// Delete a webhook.
    Delete {
        /// `wh_…`
        webhook: String,
    },
}

/// How long a test's answer is waited for: somewhat longer than a webhook has.
const TEST_TRIES: u32 = 40;
const TEST_PAUSE: std::time::Duration = std::time::Duration::from_millis(500);

/// Runs a command.
pub async fn run(client: &Client, command: WebhookCommand) -> anyhow::Result<()> {
    let path = |webhook: &str| format!("/v1/webhooks/{}", part(webhook));
    match command {
        WebhookCommand::Create { url, events, only, ordered } => {
            let body = json!({"url": url, "events": events, "company_id": only, "ordered": ordered});
            let made = &client.post("/v1/webhooks", body).await?["data"];
            out::line(show::text(made, "id"));
            out::line(format_args!("secret {}", show::text(made, "secret")));
        }
        WebhookCommand::List { json } => {
            let hooks = client.pages("/v1/webhooks", "").await?;
            if json {
                show::json(&hooks);
                return Ok(());
            }
            let row = |hook: &Value| {
                let events: Vec<&str> = list(&hook["events"]).iter().filter_map(Value::as_str).collect();
                [show::text(hook, "id"), how(hook), show::text(hook, "url"), events.join(",")]
            };
            let rows = list(&hooks).iter().map(row).collect();
            show::table(["WEBHOOK", "STATUS", "URL", "EVENTS"], rows, "there is no webhook yet");
        }
        WebhookCommand::Test { webhook, event } => test(client, &path(&webhook), event).await?,
        WebhookCommand::Deliveries { webhook, status, json } => {
            let query = status.map(|status| format!("&status={}", part(&status))).unwrap_or_default();
            let all = client.get(&format!("{}/deliveries?limit=100{query}", path(&webhook))).await?["data"].clone();
            if json {
                show::json(&all);
                return Ok(());
            }
            let row = |one: &Value| {
                ["id", "event", "status", "attempts", "last_status", "next_attempt_at", "last_error"]
                    .map(|key| show::text(one, key))
            };
            let rows = list(&all).iter().map(row).collect();
            show::table(
                ["DELIVERY", "EVENT", "STATUS", "TRIES", "ANSWER", "NEXT TRY", "ERROR"],
                rows,
                "nothing was told to it",
            );
        }
        WebhookCommand::Redeliver { webhook, delivery: Some(delivery), .. } => {
            let path = format!("{}/deliveries/{}/redeliver", path(&webhook), part(&delivery));
            client.post(&path, json!({})).await?;
            out::line(format_args!("sent again: {delivery}"));
        }
        WebhookCommand::Redeliver { webhook, since, status, .. } => {
            let (mut sent, mut cursor) = (0, Value::Null);
            loop {
                let mut body = json!({"since": since, "status": status});
                if cursor.is_string() {
                    body["cursor"] = cursor;
                }
                let part = &client.post(&format!("{}/redeliver", path(&webhook)), body).await?["data"];
                sent += part["count"].as_i64().unwrap_or_default();
                cursor = part["cursor"].clone();
                if cursor.is_null() {
                    break;
                }
            }
            out::line(format_args!("sent again: {sent}"));
        }
        WebhookCommand::RotateSecret { webhook } => {
            let made = &client.post(&format!("{}/rotate-secret", path(&webhook)), json!({})).await?["data"];
            out::line(format_args!("secret {}", show::text(made, "secret")));
        }
        WebhookCommand::Enable { webhook } => set(client, &path(&webhook), "active").await?,
        WebhookCommand::Disable { webhook } => set(client, &path(&webhook), "disabled").await?,
        WebhookCommand::Delete { webhook } => {
            client.delete(&path(&webhook)).await?;
            out::line(format_args!("deleted {webhook}"));
        }
    }
    Ok(())
}

async fn set(client: &Client, path: &str, status: &str) -> anyhow::Result<()> {
    let hook = &client.patch(path, json!({"status": status})).await?["data"];
    out::line(format_args!("{} is {}", show::text(hook, "id"), show::status(status)));
    Ok(())
}

/// How a webhook is, in a word or two.
fn how(hook: &Value) -> String {
    match (hook["disabled_reason"].as_str(), hook["failing_since"].as_str()) {
        (Some(reason), _) => format!("disabled: {reason}"),
        (None, Some(since)) => format!("failing since {since}"),
        (None, None) => show::text(hook, "status"),
    }
}

async fn test(client: &Client, path: &str, event: Option<String>) -> anyhow::Result<()> {
    let made = client.post(&format!("{path}/test"), json!({"event": event})).await?["data"].clone();
    let delivery = format!("{path}/deliveries/{}", part(&show::text(&made, "id")));
    let mut shown = made;
    for _ in 0..TEST_TRIES {
        if shown["attempts"].as_i64().unwrap_or_default() > 0 || shown["status"] != "pending" {
            break;
        }
        tokio::time::sleep(TEST_PAUSE).await;
        shown = client.get(&delivery).await?["data"].clone();
    }
    let last = list(&shown["tries"]).last().cloned().unwrap_or_default();
    match shown["status"].as_str() {
        Some("succeeded") => out::line(format_args!(
            "{}: answered {} in {} ms",
            show::status("completed"),
            show::text(&last, "status"),
            show::text(&last, "latency_ms")
        )),
        _ if last.is_null() => out::line("not sent yet: is a worker running that serves the queue `webhooks`?"),
        _ => out::line(format_args!("{}: {}", show::status("failed"), show::text(&shown, "last_error"))),
    }
    Ok(())
}
