//! The server, as the client's commands see it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use super::exit::{AWAY, Exit, REFUSED};

/// What `capx dev` leaves for other programs, in the directory where it was started.
const DEV_FILE: &str = ".capx/dev.json";
/// How long an answer may take, beside what it was asked to wait.
const PATIENCE: Duration = Duration::from_secs(90);
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Tries of one request. A change carries an idempotency key, so that one whose
/// answer was lost is not made twice.
const TRIES: u32 = 4;
/// The pause before the second try; it doubles.
const PAUSE: Duration = Duration::from_millis(250);
/// What a server may ask for before the next try.
const RETRY_AFTER_MAX: u64 = 5;

/// Where the server is, and who asks.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// The API's address; without, that of a `capx dev` in this directory.
    #[arg(long, env = "CAPX_API_URL", global = true)]
    api_url: Option<String>,
    /// The key.
    #[arg(long, env = "CAPX_API_KEY", hide_env_values = true, global = true)]
    api_key: Option<String>,
    /// The company (co_…); needed where the key may see several.
    #[arg(long, env = "CAPX_COMPANY", global = true)]
    company: Option<String>,
}

/// A server that answers.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: String,
    company: Option<String>,
}

impl Client {
    /// By what was said, or by what `capx dev` has left here.
    pub fn new(args: ServerArgs) -> anyhow::Result<Self> {
        let left = match (&args.api_url, &args.api_key) {
            (Some(_), Some(_)) => Value::Null,
            _ => dev_file(Path::new(DEV_FILE))?,
        };
        let or_left = |said: Option<String>, key: &str| said.or_else(|| left[key].as_str().map(str::to_owned));
        // A key belongs to one server: that of the file goes nowhere else.
        let own = args.api_url.as_deref().is_none_or(|url| Some(url) == left["base_url"].as_str());
        let key = if own { or_left(args.api_key, "api_key") } else { args.api_key };
        let Some(base) = or_left(args.api_url, "base_url") else {
            bail!(Exit::with(
                AWAY,
                "no server is named: set CAPX_API_URL and CAPX_API_KEY, or start `capx dev` in this directory"
            ));
        };
        let Some(key) = key else {
            bail!(Exit::with(REFUSED, format!("no key for {base}: set CAPX_API_KEY (`capx keys create` makes one)")));
        };
        // May have been installed by another part of the process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_MAX)
            .user_agent(concat!("capx/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("no HTTP client")?;
        Ok(Self { http, base: base.trim_end_matches('/').to_owned(), key, company: args.company })
    }

    /// What is at a path; `data` and `meta`.
    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send(Method::GET, path, None).await
    }

    /// The bytes at a path.
    pub async fn bytes(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let answer = self.request(Method::GET, path).send().await.map_err(|error| self.away(&error.into()))?;
        if !answer.status().is_success() {
            // Why not.
            self.answered(answer).await?;
            bail!(Exit::with(AWAY, "the answer was empty"));
        }
        let bytes = answer.bytes().await.map_err(|error| self.away(&error.into()))?;
        Ok(bytes.into())
    }

    /// Makes a change, once, whatever happens to the answer.
    pub async fn post(&self, path: &str, body: Value) -> anyhow::Result<Value> {
        self.send(Method::POST, path, Some(body)).await
    }

    /// Changes what is at a path.
    pub async fn patch(&self, path: &str, body: Value) -> anyhow::Result<Value> {
        self.send(Method::PATCH, path, Some(body)).await
    }

    /// Deletes what is at a path.
    pub async fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.send(Method::DELETE, path, Some(Value::Object(serde_json::Map::new()))).await
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let key = Uuid::now_v7().to_string();
        let mut pause = PAUSE;
        for again in (0..TRIES).rev() {
            let mut request = self.request(method.clone(), path).timeout(PATIENCE);
            if let Some(body) = &body {
                request = request.header("idempotency-key", &key).json(body);
            }
            let trouble = match request.send().await {
                Ok(answer) if passes(answer.status()) && again > 0 => {
                    let after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
                    pause = pause.max(Duration::from_secs(after.unwrap_or(0).min(RETRY_AFTER_MAX)));
                    None
                }
                Ok(answer) => match self.answered(answer).await {
                    Err(error) if error.is::<reqwest::Error>() => Some(error),
                    answered => return answered,
                },
                Err(error) => Some(error.into()),
            };
            if let Some(error) = trouble.filter(|_| again == 0) {
                return Err(self.away(&error));
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        unreachable!("the last try returns")
    }

    /// A request to be sent by hand, such as one for a stream.
    pub(super) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.key)
    }

    /// What an answer says: its body, or why it was refused.
    pub(super) async fn answered(&self, answer: reqwest::Response) -> anyhow::Result<Value> {
        let status = answer.status();
        let text = answer.text().await?;
        let body: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if status.is_success() && body.is_object() {
            return Ok(body);
        }
        if body["error"].is_object() {
            let code = if status.is_server_error() { AWAY } else { REFUSED };
            return Err(Exit::with(code, told(&body)));
        }
        Err(Exit::with(AWAY, format!("{} answers {status}, and not as capx does; is it the right address?", self.base)))
    }

    pub(super) fn away(&self, error: &anyhow::Error) -> anyhow::Error {
        let root = error.root_cause();
        Exit::with(AWAY, format!("{} does not answer: {root}; is the server running?", self.base))
    }

    /// The path of the company that is meant.
    pub async fn company(&self) -> anyhow::Result<String> {
        if let Some(company) = &self.company {
            return Ok(format!("/v1/companies/{}", part(company)));
        }
        let body = self.get("/v1/companies?limit=2").await?;
        match list(&body["data"]) {
            [only] => Ok(format!("/v1/companies/{}", only["id"].as_str().unwrap_or_default())),
            [] => bail!(Exit::with(REFUSED, "there is no company yet")),
            _ => bail!(Exit::with(REFUSED, "the key may see several companies: say which with --company co_…")),
        }
    }

    /// Where lists begin: at the company that was named, or at all that the key sees.
    fn scope(&self) -> String {
        self.company.as_deref().map_or_else(|| "/v1".to_owned(), |company| format!("/v1/companies/{}", part(company)))
    }

    /// All that a list holds, page by page, of the company that was named or of all;
    /// `query` is what it is asked with.
    pub async fn all(&self, what: &str, query: &str) -> anyhow::Result<Value> {
        self.pages(&format!("{}/{what}", self.scope()), query).await
    }

    /// The same of the list at a path.
    pub async fn pages(&self, path: &str, query: &str) -> anyhow::Result<Value> {
        let (mut all, mut cursor) = (Vec::new(), String::new());
        loop {
            let mut page = self.get(&format!("{path}?limit=100{query}{cursor}")).await?;
            all.extend(page["data"].as_array_mut().map(std::mem::take).unwrap_or_default());
            match page["meta"]["cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={}", part(next)),
                None => return Ok(Value::Array(all)),
            }
        }
    }

    /// A playbook by its id or its name, as lists show it, or whole.
    pub async fn playbook(&self, playbook: &str) -> anyhow::Result<Value> {
        if playbook.starts_with("pb_") {
            return Ok(self.get(&format!("/v1/playbooks/{}", part(playbook))).await?["data"].clone());
        }
        let found = self.get(&format!("{}/playbooks?limit=2&name={}", self.scope(), part(playbook))).await?;
        match list(&found["data"]) {
            [one] => Ok(one.clone()),
            [] => bail!(Exit::with(
                REFUSED,
                format!("there is no playbook `{playbook}`; `capx playbook list` shows those there are")
            )),
            _ => bail!(Exit::with(
                REFUSED,
                format!("several companies have a playbook `{playbook}`: say which with --company co_…")
            )),
        }
    }

    /// A run by its id.
    pub async fn run(&self, run: &str) -> anyhow::Result<Value> {
        Ok(self.get(&format!("/v1/runs/{}", part(run))).await?["data"].clone())
    }
}

/// What a list holds; nothing where there is none.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The path of a playbook.
pub fn path_of(playbook: &Value) -> String {
    let text = |key: &str| playbook[key].as_str().unwrap_or_default();
    format!("/v1/companies/{}/playbooks/{}", text("company_id"), text("id"))
}

/// The path of a run.
pub fn path_of_run(run: &Value) -> String {
    let text = |key: &str| run[key].as_str().unwrap_or_default();
    format!("/v1/companies/{}/playbooks/{}/runs/{}", text("company_id"), text("playbook_id"), text("run_id"))
}

/// A text as a part of a path or a value of a query.
pub fn part(text: &str) -> String {
    // In a path a plus is one, so a space is written out.
    form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>().replace('+', "%20")
}

/// It may be otherwise in a moment.
fn passes(status: StatusCode) -> bool {
    matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS | StatusCode::BAD_GATEWAY)
}

/// A refusal with all that helps: each field, the request's id, where to read on.
fn told(body: &Value) -> String {
    let error = &body["error"];
    let mut told = error["message"].as_str().unwrap_or("refused").to_owned();
    for field in list(&error["fields"]) {
        let text = |key: &str| field[key].as_str().unwrap_or_default();
        let line = format!("{}: {}", text("field"), text("message"));
        // Of several the message names one or none.
        if told != line {
            told.push_str(&format!("\n  {line}"));
        }
    }
    let request = body["meta"]["request_id"].as_str().unwrap_or("unknown");
    told.push_str(&format!("\n  {} (request {request})", error["code"].as_str().unwrap_or("error")));
    told
}

fn dev_file(path: &Path) -> anyhow::Result<Value> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("{} cannot be read", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(json!({})),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}
