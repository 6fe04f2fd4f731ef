"""What the licences of known bases ask of pictures and models that come from them. Not legal advice.

Keys are parts of a licence's name, as a model's card states it.
"""

# for a training set of the base's pictures
OUTPUT_TERMS = {
    "non-commercial": "The FLUX non-commercial licence forbids training commercial models, or models that compete "
    "with FLUX, on these pictures.",
    "stabilityai": "The Stability AI Community Licence forbids creating or improving foundational generative models "
    "with these pictures, other than its own models and those made from them.",
}
# for a model made from the base, and the notice that has to travel with such a model
MODEL_TERMS = {
    "non-commercial": "The FLUX non-commercial licence covers models made from the base: use this one, and pass it "
    "on, only as that licence allows, with a copy of it and with its notice. It asks those who offer the model to "
    "filter or review what is drawn and to say that it is AI-generated, and forbids training commercial models, or "
    "models that compete with FLUX, on the model or its pictures. This is a modified model, not an official product "
    "of Black Forest Labs.",
    "stabilityai": "The Stability AI Community Licence covers models made from the base. It ends for those with more "
    "than a million US dollars of yearly revenue, who need a licence of their own from Stability AI. Pass this model "
    "on with a copy of it, show 'Powered by Stability AI' where you offer the model, and keep beside it a file Notice "
    "that says: This Stability AI Model is licensed under the Stability AI Community License, Copyright (c) Stability "
    "AI Ltd. All Rights Reserved. It forbids creating or improving other foundational generative models with the "
    "model or its pictures. This is a modified model, not a product of Stability AI.",
}
NOTICES = {
    "non-commercial": "This FLUX Model is licensed by Black Forest Labs Inc. under the FLUX Non-Commercial License. "
    "Copyright Black Forest Labs Inc. IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR "
    "OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH "
    "USE OF THIS MODEL."
}
