//! Notifications of storage about new objects: SNS, SQS, EventBridge, S3, MinIO, RustFS.
//!
//! They wake the discovery of the pipelines whose source lies there, and nothing else.
//! Shapes: <https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html>,
//! <https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html>.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use alluvium_protocol::{Code, Error, Pipeline, Result};
use alluvium_table::store::bucket_and_prefix;
use aws_lc_rs::signature::{
    RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use url::Url;

use crate::alerts::sinks::client;

/// A body of more bytes is none of these.
pub const BODY_BYTES_MAX: usize = 512 * 1024;
/// Tests name a host (with its port) that gives certificates like Amazon's.
const TEST_HOST: &str = "ALLUVIUM_TEST_SNS_HOST";

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Objects came: bucket and key, decoded.
    Objects(Vec<(String, String)>),
    /// Well formed, and about nothing that came.
    Nothing,
    /// SNS asks whether this address wants its messages.
    Subscribe {
        /// The URL that says yes.
        url: String,
    },
}

fn refused(why: impl std::fmt::Display) -> Error {
    Error::new(Code::NotifyRefused, format!("notification: {why}"))
}

/// Envelopes in envelopes, at most: S3 to SNS to SQS to EventBridge Pipes.
const DEPTH_MAX: usize = 6;

/// Reads a message that is no envelope, or the content of one. What is understood of a batch counts.
pub fn objects_of(message: &Value) -> Result<Said> {
    objects_within(message, DEPTH_MAX)
}

fn objects_within(message: &Value, depth: usize) -> Result<Said> {
    if depth == 0 {
        return Err(refused("envelopes in envelopes"));
    }
    let lists = [message, &message["Records"], &message["Messages"]];
    if let Some(list) = lists.iter().find_map(|list| list.as_array()) {
        return objects_of_all(list, depth);
    }
    // SQS (`body` where it is forwarded), SNS: the event is a text within.
    let sns = if message["Sns"].is_object() { &message["Sns"] } else { message };
    let texts = [&message["body"], &message["Body"], &sns["Message"]];
    if let Some(text) = texts.iter().find_map(|text| text.as_str()) {
        let inner = serde_json::from_str(text).map_err(|e| refused(format!("within: {e}")))?;
        return objects_within(&inner, depth - 1);
    }
    if message["Event"] == "s3:TestEvent" {
        return Ok(Said::Nothing);
    }
    let named = |of: &Value| {
        let (bucket, key) = (of["bucket"]["name"].as_str()?, of["object"]["key"].as_str()?);
        Some((bucket.to_owned(), key.to_owned()))
    };
    if message["s3"].is_object() {
        // One without an object is well formed.
        let found = named(&message["s3"]).map(|(bucket, key)| (bucket, decoded(&key)));
        return Ok(Said::Objects(found.into_iter().collect()));
    }
    // EventBridge does not encode keys.
    match named(&message["detail"]) {
        Some(found) => Ok(Said::Objects(vec![found])),
        None => {
            Err(refused("neither an S3 event (Records), nor EventBridge (detail), nor SNS (Type)"))
        }
    }
}

fn objects_of_all(list: &[Value], depth: usize) -> Result<Said> {
    let (mut objects, mut failed) = (Vec::new(), None);
    for one in list {
        match objects_within(one, depth - 1) {
            Ok(Said::Objects(found)) => objects.extend(found),
            Ok(_) => {}
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if objects.is_empty() => Err(error),
        _ => Ok(Said::Objects(objects)),
    }
}

/// Keys of S3 events are encoded as in a form.
fn decoded(key: &str) -> String {
    let pair = format!("k={key}");
    let mut pairs = url::form_urlencoded::parse(pair.as_bytes());
    pairs.next().map_or_else(|| key.to_owned(), |(_, key)| key.into_owned())
}

/// Pipelines whose source holds one of these objects.
pub fn woken<'a>(pipelines: &'a [Pipeline], objects: &[(String, String)]) -> Vec<&'a str> {
    let is_in = |pipeline: &&Pipeline| {
        let Ok(Some((source, prefix))) = bucket_and_prefix(&pipeline.source) else { return false };
        let below = |key: &str| {
            let rest = key.strip_prefix(&prefix);
            prefix.is_empty() || rest.is_some_and(|rest| rest.starts_with('/'))
        };
        objects.iter().any(|(bucket, key)| *bucket == source && below(key))
    };
    pipelines.iter().filter(is_in).map(|pipeline| pipeline.id.as_str()).collect()
}

/// Reads a body, and checks it where it is signed. `topics` are the SNS topics that may speak.
/// The flag says whether the signature proves the sender.
pub async fn read(body: &[u8], topics: &[String]) -> Result<(Said, bool)> {
    let message: Value =
        serde_json::from_slice(body).map_err(|e| refused(format!("no JSON: {e}")))?;
    let Some(kind) = message["Type"].as_str() else {
        return Ok((objects_of(&message)?, false));
    };
    let topic = message["TopicArn"].as_str().unwrap_or_default();
    if !topics.iter().any(|known| known == topic) {
        return Err(refused(format!("the topic {topic:?} is not in notify.topics")));
    }
    verify(&message, kind).await?;
    let said = match kind {
        "Notification" => {
            let text = message["Message"].as_str().unwrap_or_default();
            let inner =
                serde_json::from_str(text).map_err(|e| refused(format!("no JSON in it: {e}")))?;
            objects_of(&inner)?
        }
        "SubscriptionConfirmation" => {
            let url = message["SubscribeURL"].as_str().unwrap_or_default().to_owned();
            check_host(&url)?;
            Said::Subscribe { url }
        }
        _ => Said::Nothing,
    };
    Ok((said, true))
}

/// Says yes to SNS.
pub async fn subscribe(url: &str) -> Result<()> {
    let client = client().map_err(Error::internal)?;
    let answer = client.get(url).send().await.map_err(|e| refused(e.without_url()))?;
    match answer.status().is_success() {
        true => Ok(()),
        false => Err(refused(format!("SNS answered {} to the subscription", answer.status()))),
    }
}

/// The text that SNS signs.
fn canonical(message: &Value, kind: &str) -> String {
    let names: &[&str] = match kind {
        "Notification" => &["Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"],
        _ => &["Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"],
    };
    let mut text = String::new();
    for name in names {
        if let Some(value) = message[*name].as_str() {
            text.push_str(&format!("{name}\n{value}\n"));
        }
    }
    text
}

async fn verify(message: &Value, kind: &str) -> Result<()> {
    let url = message["SigningCertURL"].as_str().unwrap_or_default();
    check_host(url)?;
    let signature = STANDARD
        .decode(message["Signature"].as_str().unwrap_or_default())
        .map_err(|e| refused(format!("the signature is no base64: {e}")))?;
    let pem = certificate(url).await?;
    let version = message["SignatureVersion"].as_str().unwrap_or_default();
    check_signature(&pem, version, canonical(message, kind).as_bytes(), &signature)
}

/// `SignatureVersion` 1 is SHA-1, 2 is SHA-256, both with RSA.
fn check_signature(pem: &[u8], version: &str, text: &[u8], signature: &[u8]) -> Result<()> {
    let bad = |why: &str| refused(format!("the signing certificate cannot be used: {why}"));
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem).map_err(|e| bad(&e.to_string()))?;
    let certificate = pem.parse_x509().map_err(|e| bad(&e.to_string()))?;
    if !certificate.validity().is_valid() {
        return Err(bad("it is not valid now"));
    }
    let key = certificate.public_key().subject_public_key.data.as_ref();
    let algorithm = match version {
        "1" => &RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY,
        "2" => &RSA_PKCS1_2048_8192_SHA256,
        other => return Err(refused(format!("signature version {other:?} is unknown"))),
    };
    UnparsedPublicKey::new(algorithm, key)
        .verify(text, signature)
        .map_err(|_| refused("the signature is wrong"))
}

/// Certificates and subscriptions are Amazon's, or a test's.
fn check_host(text: &str) -> Result<()> {
    let url = Url::parse(text).map_err(|e| refused(format!("{text:?} is no URL: {e}")))?;
    let host = url.host_str().unwrap_or_default();
    let at = match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    if std::env::var(TEST_HOST).is_ok_and(|test| test == at) {
        return Ok(());
    }
    let region = host.strip_prefix("sns.").and_then(|rest| {
        rest.strip_suffix(".amazonaws.com").or(rest.strip_suffix(".amazonaws.com.cn"))
    });
    let is_region = region.is_some_and(|region| {
        !region.is_empty() && region.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    });
    if url.scheme() == "https" && is_region && url.port().is_none() {
        return Ok(());
    }
    Err(refused(format!("{at} is not a host of SNS")))
}

/// A signing certificate; those that were fetched are kept.
async fn certificate(url: &str) -> Result<Vec<u8>> {
    static KNOWN: Mutex<Option<HashMap<String, Vec<u8>>>> = Mutex::new(None);
    let known = {
        let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().and_then(|known| known.get(url).cloned())
    };
    if let Some(pem) = known {
        return Ok(pem);
    }
    let failed =
        |e: reqwest::Error| refused(format!("the signing certificate: {}", e.without_url()));
    let client = client().map_err(failed)?;
    let answer = client.get(url).send().await.and_then(|answer| answer.error_for_status());
    let pem = answer.map_err(failed)?.bytes().await.map_err(failed)?.to_vec();
    if pem.len() > BODY_BYTES_MAX {
        return Err(refused("the signing certificate is too large"));
    }
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.get_or_insert_default().insert(url.to_owned(), pem.clone());
    Ok(pem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_shape_names_its_objects() {
        let s3 = json!({"Records": [
            {"eventSource": "aws:s3", "s3": {"bucket": {"name": "b"}, "object": {"key": "in/17%2B1/a+b.parquet"}}},
            {"eventSource": "aws:s3", "s3": {"bucket": {"name": "b"}, "object": {}}},
        ]});
        let one = Said::Objects(vec![("b".to_owned(), "in/17+1/a b.parquet".to_owned())]);
        assert_eq!(objects_of(&s3).unwrap(), one);
        let minio = json!({"EventName": "s3:ObjectCreated:Put", "Key": "b/in/1/x", "Records": [
            {"eventSource": "minio:s3", "s3": {"bucket": {"name": "b"}, "object": {"key": "in%2F1%2Fx"}}},
        ]});
        let x = Said::Objects(vec![("b".to_owned(), "in/1/x".to_owned())]);
        assert_eq!(objects_of(&minio).unwrap(), x);
        let bridge = json!({"source": "aws.s3", "detail-type": "Object Created",
            "detail": {"bucket": {"name": "b"}, "object": {"key": "in/1/x"}}});
        assert_eq!(objects_of(&bridge).unwrap(), x);
        let test = json!({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "b"});
        assert_eq!(objects_of(&test).unwrap(), Said::Nothing);
        assert!(objects_of(&json!({"hello": 1})).is_err());
        let sns = json!({"Type": "Notification", "Message": bridge.to_string()});
        for envelope in [
            json!({"Records": [{"body": sns.to_string()}]}),
            json!({"Records": [{"Sns": {"Message": bridge.to_string()}}]}),
            json!({"Messages": [{"MessageId": "1", "Body": sns.to_string()}]}),
            json!({"MessageId": "1", "Body": bridge.to_string()}),
            json!([bridge, bridge]),
            json!({"Records": [{"body": "no JSON"}, {"body": bridge.to_string()}]}),
        ] {
            let Said::Objects(mut found) = objects_of(&envelope).unwrap() else { panic!() };
            found.dedup();
            assert_eq!(Said::Objects(found), x, "{envelope}");
        }
        let deep = (0..20).fold(bridge, |inner, _| json!({"Body": inner.to_string()}));
        assert!(objects_of(&deep).is_err());
    }

    #[test]
    fn only_sns_may_be_asked() {
        for good in [
            "https://sns.eu-central-1.amazonaws.com/x.pem",
            "https://sns.cn-north-1.amazonaws.com.cn/x",
        ] {
            assert!(check_host(good).is_ok(), "{good}");
        }
        for bad in [
            "http://sns.eu-central-1.amazonaws.com/x.pem",
            "https://sns.eu-central-1.amazonaws.com.evil.org/x.pem",
            "https://evil.org/sns.eu.amazonaws.com",
            "https://sns.a.b.amazonaws.com/x",
            "https://sns.eu-central-1.amazonaws.com:444/x",
            "https://user@evil.org/",
        ] {
            assert!(check_host(bad).is_err(), "{bad}");
        }
    }
}
